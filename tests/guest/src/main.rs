//! The one program inside the rig's machines.
//!
//! As process 1 it is the init of an L1 host or of an L2 guest, as the kernel command line says (`cvmm.role=l1`).
//! Called by name it is the agent that runs commands for `scripts/rig`, or one end of a checked transfer.

mod agent;
mod bench;
mod checks;
mod cmdline;
mod endpoint;
mod frame;
mod init;
mod process;
mod report;
mod transfer;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cvmm-guest serve ENDPOINT              accept one connection and answer its transfer
       cvmm-guest bench-serve ENDPOINT        accept one connection and answer the timings of scripts/bench
       cvmm-guest connect ENDPOINT MIB [MIB]  send MIB mebibytes, then receive as many (or the second number)
       cvmm-guest quote UNIX-SOCKET NONCE-HEX FILE  hand a guest the nonce and store the report that it sends
       cvmm-guest relay ENDPOINT              accept one connection, pass on what comes and standard input
       cvmm-guest agent                       run commands for scripts/rig (L1 only)
ENDPOINT: tcp:ADDRESS:PORT | vsock:CID:PORT | unix:PATH | hybrid:PATH:PORT (a VMM's vsock socket, CONNECT line)";

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::run();
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match *words {
        ["agent"] => agent::run(),
        ["serve", endpoint] => endpoint::accept(endpoint).and_then(transfer::answer).map(say),
        ["bench-serve", endpoint] => endpoint::accept(endpoint).and_then(bench::serve).map(say),
        ["relay", endpoint] => endpoint::relay(endpoint),
        ["connect", endpoint, mib] => connect(endpoint, mib, mib),
        ["connect", endpoint, out, back] => connect(endpoint, out, back),
        ["quote", path, nonce, file] => report::collect(path, nonce, file),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cvmm-guest: {error}");
            ExitCode::FAILURE
        }
    }
}

fn connect(endpoint: &str, out: &str, back: &str) -> std::io::Result<()> {
    let mebibytes = |text: &str| text.parse::<u32>().map_err(std::io::Error::other);
    transfer::start(endpoint::connect(endpoint)?, mebibytes(out)?, mebibytes(back)?).map(say)
}

fn say(summary: String) {
    println!("{summary}");
}
