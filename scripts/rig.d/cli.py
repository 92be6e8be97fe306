"""The command line of scripts/rig."""

import argparse
import os
import signal
import sys
import termios
import tty
from pathlib import Path

import archive
import lifetime
import snp_keys
import session
from machine import Spec
from report import RigError

USAGE = """\
scripts/rig [OPTION]... -- COMMAND...     boot L1, run COMMAND in it, end L1; gives COMMAND's output and exit code
scripts/rig up [OPTION]... [--name N]     boot an L1 that stays (for --lifetime seconds)
scripts/rig exec [--name N] [--timeout S] [--env K=V]... [--stdin|--raw] -- COMMAND...
scripts/rig push [--name N] SRC[:DST]...  put files into L1 (DST: a path, /root/NAME when left out)
scripts/rig pull [--name N] SRC DST       get a file out of L1
scripts/rig certs                         the folder of the emulated SNP host's certificates (ark.pem, ask.pem,
                                          vcek.pem) and of the table for its guests (certs.table)
scripts/rig console|list|down [--name N]  L1's kernel log; the L1s that are up; end one

OPTION: --snp or --tdx (an emulated SEV-SNP or TDX host), --patched (an ordinary host in the same patched QEMU, in
which guests of several processors do not hang), --cpus N, --memory MB, --file SRC[:DST], --disk PATH, --with-qemu
(QEMU in L1 as /opt/qemu/run), --append WORDS (for L1's kernel), --timeout S, --env K=V, --stdin, and --raw (each key
goes to COMMAND at once, as a guest's console wants it; Ctrl-] ends).

L1 is Debian's newest kernel (--tdx: built from its source) with KVM and busybox. Its console and QEMU's messages
are in the L1's folder under /tmp/cvmm-rig.UID/NAME. Exit codes: COMMAND's; 124 its time was up; 128 + N signal N; 125 the rig itself.
"""
RIG_FAILED = 125
MEMORY_MIN = 512
CPUS = range(1, 65)
VERBS = ("up", "exec", "push", "pull", "console", "list", "down", "certs")


def _parser(verb):
    parser = argparse.ArgumentParser(prog="scripts/rig", usage=USAGE, add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    if verb in ("run", "up"):
        parser.add_argument("--snp", dest="kind", action="store_const", const="snp", default="plain")
        parser.add_argument("--tdx", dest="kind", action="store_const", const="tdx")
        parser.add_argument("--patched", action="store_true", help="the patched QEMU for an ordinary L1 too")
        parser.add_argument("--cpus", type=int, default=1)
        parser.add_argument("--memory", type=int, default=2500, metavar="MB")
        parser.add_argument("--file", action="append", default=[], metavar="SRC[:DST]")
        parser.add_argument("--disk", action="append", default=[], metavar="PATH")
        parser.add_argument("--append", default="", help="more words for L1's kernel command line")
        parser.add_argument("--with-qemu", action="store_true", help="QEMU in L1, as /opt/qemu/run")
    if verb == "up":
        parser.add_argument("--lifetime", type=float, default=4 * 3600, metavar="S")
    if verb in ("run", "exec"):
        parser.add_argument("--timeout", type=float, default=0, metavar="S")
        parser.add_argument("--stdin", action="store_true")
        parser.add_argument("--raw", action="store_true", help="--stdin, each key at once; Ctrl-] ends")
        parser.add_argument("--env", action="append", default=[], metavar="K=V")
    if verb in ("push", "pull"):
        parser.add_argument("paths", nargs="+")
    if verb != "run":
        parser.add_argument("--name", default="l1")
    return parser


def main(arguments):
    """Runs the command line; gives the exit code."""
    verb = arguments[0] if arguments and arguments[0] in VERBS else "run"
    arguments = arguments if verb == "run" else arguments[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    own, words = arguments[:split], arguments[split + 1 :]
    options = _parser(verb).parse_args(own)
    if options.help or (verb in ("run", "exec") and not words):
        print(USAGE, end="", file=sys.stdout if options.help else sys.stderr)
        return 0 if options.help else 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return archive.with_fresh_lists(lambda: globals()[f"_{verb}"](options, words)) or 0
    except RigError as error:
        print(f"rig: {error}", file=sys.stderr)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("rig: interrupted", file=sys.stderr)
    return RIG_FAILED


def _spec(options):
    if options.memory < MEMORY_MIN:
        raise RigError(f"--memory {options.memory}: L1 needs at least {MEMORY_MIN} MB")
    if options.cpus not in CPUS:
        raise RigError(f"--cpus {options.cpus}: L1 takes {CPUS.start} to {CPUS.stop - 1}")
    for disk in options.disk:
        if not Path(disk).exists():
            raise RigError(f"--disk {disk}: no such file")
    return Spec(
        options.kind, options.cpus, options.memory, options.with_qemu, options.append, options.disk, options.patched,
    )  # fmt: skip


def _pairs(paths):
    pairs = []
    for path in paths:
        source, _, target = path.partition(":")
        target = target or f"/root/{Path(source).name}"
        pairs.append((Path(source), target + Path(source).name if target.endswith("/") else target))
        if not Path(source).exists():
            raise RigError(f"{source}: no such file to put into L1")
    return pairs


def _command(folder, options, words):
    stdin = sys.stdin.fileno() if options.stdin or options.raw else None
    command = session.Session(folder, words, options.timeout, stdin, options.env)
    if not (options.raw and sys.stdin.isatty()):
        return command.run()
    before = termios.tcgetattr(stdin)
    try:
        tty.setraw(stdin)
        return command.run()
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)


def _run(options, words):
    pairs = _pairs(options.file)
    with lifetime.for_now(_spec(options)) as folder:
        if pairs:
            session.push(folder, pairs)
        return _command(folder, options, words)


def _up(options, _):
    pairs = _pairs(options.file)
    lifetime.keep(_spec(options), options.name, options.lifetime)
    if pairs:
        session.push(lifetime.kept(options.name), pairs)


def _exec(options, words):
    return _command(lifetime.kept(options.name), options, words)


def _push(options, _):
    session.push(lifetime.kept(options.name), _pairs(options.paths))


def _pull(options, _):
    if len(options.paths) != 2:
        raise RigError("pull takes a file of L1 and a file here")
    session.pull(lifetime.kept(options.name), *options.paths)


def _console(options, _):
    log = lifetime.home() / options.name / "console.log"
    if not log.exists():
        raise RigError(f"no L1 named {options.name} has a console log")
    print(log.read_text(errors="replace"), end="")


def _list(*_):
    print("".join(f"{name}\n" for name in lifetime.names()), end="", flush=True)


def _certs(*_):
    print(snp_keys.folder())


def _down(options, _):
    lifetime.down(options.name)
