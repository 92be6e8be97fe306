use clap::Parser;
use proptest::prelude::*;

use super::*;

/// The flags alone, as `cvmm run` takes them.
#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    config: Config,
}

fn parse(line: &str) -> Result<Config, clap::Error> {
    let words = std::iter::once("cvmm").chain(line.split_whitespace());
    Flags::try_parse_from(words).map(|flags| flags.config)
}

fn from_json(json: &str) -> Result<Config, String> {
    Config::parse(json.as_bytes()).map_err(|e| e.to_string())
}

const ALL_FLAGS: &str = "--kernel k --initrd i --cmdline quiet --memory 512M --cpus 2 --platform snp --machine v1 \
    --disk a,bandwidth=10M,operations=500 --disk b,ro,queues=4 --net tap=tap0 --net fd=7,mac=02:00:00:00:00:0a --net passt=/p,queues=1,rx-bandwidth=1M,tx-operations=9 \
    --vsock cid=3,uds=/v --rng --console socket=/c --policy 0x30000 \
    --host-data 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f \
    --id-block ib --id-auth ia --certs c --debug-swap --secure-tsc --events fd:5 --ready-fd 6 --no-reboot";

const ALL_JSON: &str = r#"{
    "boot": {"kernel": "k", "initrd": "i", "cmdline": "quiet"},
    "memory": "512M", "cpus": 2, "platform": "snp", "machine": "v1",
    "devices": {
        "disks": [{"path": "a", "limit": {"bandwidth": "10M", "operations": 500}}, {"path": "b", "readonly": true, "queues": 4}],
        "nets": [{"tap": "tap0"}, {"fd": 7, "mac": "02:00:00:00:00:0a"}, {"passt": "/p", "queues": 1,
            "rx_limit": {"bandwidth": "1M"}, "tx_limit": {"operations": 9}}],
        "vsock": {"cid": 3, "uds": "/v"}, "rng": true, "console": "socket=/c"
    },
    "snp": {
        "policy": "0x30000", "host_data": "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
        "id_block": "ib", "id_auth": "ia", "certs": "c", "debug_swap": true, "secure_tsc": true
    },
    "notify": {"events": "fd:5", "ready_fd": 6, "no_reboot": true}
}"#;

#[test]
fn flags_and_json_are_one_model() {
    let flags = parse(ALL_FLAGS).unwrap();
    assert_eq!(from_json(ALL_JSON).unwrap(), flags);
    let printed = serde_json::to_value(&flags).unwrap();
    assert_eq!(
        printed,
        serde_json::from_str::<serde_json::Value>(ALL_JSON).unwrap()
    );
}

#[test]
fn options_of_tdx_have_their_twins() {
    let id = "5a".repeat(48);
    for service in ["/run/tdx-qgs/qgs.socket", "vsock=2:4050"] {
        let line = format!(
            "--platform tdx --td-attributes 0x10000000 --mrconfigid {id} --mrowner {id} --mrownerconfig {id} \
             --quote-service {service}"
        );
        let json = format!(
            r#"{{"platform":"tdx","tdx":{{"td_attributes":"0x10000000","mrconfigid":"{id}","mrowner":"{id}",
                "mrownerconfig":"{id}","quote_service":"{service}"}}}}"#
        );
        let flags = parse(&line).unwrap();
        assert_eq!(from_json(&json).unwrap(), flags);
        assert_eq!(from_json(&serde_json::to_string(&flags).unwrap()).unwrap(), flags);
        assert_eq!(Config::default().overlaid(flags.clone()), flags);
    }
}

#[test]
fn flags_are_laid_over_the_file() {
    let file = parse("--kernel k --memory 1G --disk a --console pty --debug-swap").unwrap();
    let flags = parse("--memory 2G --cpus 4 --disk b,ro --rng").unwrap();
    let both = "--kernel k --memory 2G --cpus 4 --disk a --disk b,ro --rng --console pty --debug-swap";
    assert_eq!(file.overlaid(flags), parse(both).unwrap());
}

#[test]
fn an_empty_configuration_means_the_defaults() {
    let defaults = "--cmdline console=ttyS0 --memory 512M --cpus 1 --platform auto --machine v2 --console stdio --sandbox on";
    assert_eq!(Config::default().with_defaults(), parse(defaults).unwrap());
    assert_eq!(from_json("{}"), Ok(Config::default()));
}

#[test]
fn unknown_and_malformed_json_is_refused() {
    let cases = [
        (r#"{"kernal": "k"}"#, "unknown field `kernal`"),
        (r#"{"boot": {"kernal": "k"}}"#, "unknown field `kernal`"),
        (
            r#"{"devices": {"disks": [{"path": "a", "ro": true}]}}"#,
            "unknown field `ro`",
        ),
        (
            r#"{"devices": {"nets": [{"tap": "t", "vhost": 1}]}}"#,
            "unknown field `vhost`",
        ),
        (
            r#"{"devices": {"nets": [{"mac": "02:00:00:00:00:01"}]}}"#,
            "no back-end given",
        ),
        (
            r#"{"devices": {"nets": [{"tap": "t", "fd": 3}]}}"#,
            "more than one back-end",
        ),
        (
            r#"{"devices": {"vsock": {"cid": 3, "uds": "/v", "port": 1}}}"#,
            "unknown field `port`",
        ),
        (
            r#"{"devices": {"console": "tty"}}"#,
            "write stdio, pty, file=PATH, socket=PATH or none",
        ),
        (r#"{"snp": {"policy": "0xzz"}}"#, "not a hexadecimal number"),
        (r#"{"snp": {"host_data": "00"}}"#, "not 64 hexadecimal digits"),
        (r#"{"notify": {"fd": 1}}"#, "unknown field `fd`"),
        (r#"{"memory": true}"#, "a size must be a number of bytes or text"),
        (r#"{"platform": "sev"}"#, "unknown variant `sev`"),
        (r#"{"machine": "v3"}"#, "unknown variant `v3`"),
        (r#"{"cpus": -1}"#, "invalid value"),
        ("", "EOF"),
        (
            "[]",
            "invalid type: sequence, expected an object in braces at line 1",
        ),
        (r#"["vmlinuz"]"#, "expected an object in braces"),
        ("null", "expected an object in braces"),
        ("{}{}", "trailing characters"),
        (r#"{"cpus": 1, "cpus": 2}"#, "duplicate field `cpus`"),
        (r#"{"boot": {}, "boot": {}}"#, "duplicate field `boot`"),
        (
            r#"{"boot": {"kernel": "a", "kernel": "b"}}"#,
            "duplicate field `kernel`",
        ),
        (r#"{"boot": []}"#, "expected an object in braces"),
        (r#"{"boot": ["vmlinuz"]}"#, "expected an object in braces"),
        (r#"{"devices": []}"#, "expected an object in braces"),
        (r#"{"snp": []}"#, "expected an object in braces"),
        (r#"{"tdx": []}"#, "expected an object in braces"),
        (r#"{"notify": []}"#, "expected an object in braces"),
        (r#"{"confine": []}"#, "expected an object in braces"),
        (
            r#"{"devices": {"disks": [["a"]]}}"#,
            "expected an object in braces",
        ),
        (
            r#"{"devices": {"nets": [["t"]]}}"#,
            "expected an object in braces",
        ),
        (
            r#"{"devices": {"vsock": [3, "u"]}}"#,
            "expected an object in braces",
        ),
        (
            r#"{"devices": {"disks": [{"path": "a", "limit": [5]}]}}"#,
            "expected an object in braces",
        ),
        (
            r#"{"devices": {"nets": [{"tap": "t", "rx_limit": []}]}}"#,
            "expected an object in braces",
        ),
    ];
    for (json, says) in cases {
        let error = from_json(json).unwrap_err();
        assert!(error.contains(says), "{json}: {error}");
    }
}

#[test]
fn malformed_flags_are_refused_with_the_form_to_write() {
    let cases = [
        ("--memory 1Q", "write bytes or a suffix, for example 512M or 4G"),
        ("--memory 1.5G", "write bytes or a suffix"),
        ("--memory 99999999T", "larger than 2^64 bytes"),
        ("--cpus two", "invalid digit"),
        ("--disk ,ro", "no path"),
        (
            "--disk a,rw",
            "unknown option `rw`; write PATH[,ro][,queues=N][,bandwidth=SIZE][,operations=N]",
        ),
        ("--disk a,queues=x", "queues=x is not a number in range"),
        ("--disk a,bandwidth=0", "a rate of 0 would stop the device"),
        (
            "--net tap=t,rx-operations=-1",
            "operations=-1 is not a number in range",
        ),
        ("--net tap=t,bandwidth=1M", "unknown option `bandwidth=1M`"),
        (
            "--net eth0",
            "unknown option `eth0`; write tap=NAME, fd=N or passt=PATH",
        ),
        ("--net tap=a,fd=3", "more than one back-end"),
        ("--net tap=a,mac=02:00", "six hexadecimal bytes"),
        ("--net tap=a,mac=02:00:00:00:00:01:02", "six hexadecimal bytes"),
        ("--vsock cid=3", "write cid=N,uds=PATH"),
        ("--vsock cid=-1,uds=/v", "cid=-1 is not a number in range"),
        (
            "--console tty",
            "write stdio, pty, file=PATH, socket=PATH or none",
        ),
        ("--events fd:x", "fd: and the number of an open descriptor"),
        ("--platform sev", "[possible values: auto, soft, snp, tdx]"),
        ("--id-block b", "--id-auth"),
        (
            "--quote-service vsock=2",
            "or vsock=CID:PORT, for example vsock=2:4050",
        ),
        ("--quote-service vsock=2:x", "port=x is not a number in range"),
        ("--quote-service vsock=-1:4050", "cid=-1 is not a number in range"),
    ];
    for (line, says) in cases {
        let error = parse(line).unwrap_err().to_string();
        assert!(error.contains(says), "{line}: {error}");
    }
}

#[test]
fn a_file_that_is_no_configuration_is_refused_in_one_line() {
    let dir = std::env::temp_dir().join(format!("cvmm-config-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join("guest.json");
    let error = Config::load(&path).unwrap_err().to_string();
    assert_eq!(
        error,
        format!(
            "config {}: No such file or directory (os error 2); check the path and its permissions",
            path.display()
        )
    );
    std::fs::write(&path, "{\"kernel\": 1}").unwrap();
    let error = Config::load(&path).unwrap_err().to_string();
    assert!(error.starts_with(&format!("config {}: unknown field `kernel`", path.display())));
    assert!(
        error.contains("at line 1 column 9") && !error.contains('\n'),
        "{error}"
    );
    std::fs::write(&path, vec![b' '; 2 << 20]).unwrap();
    assert!(matches!(Config::load(&path), Err(ConfigError::TooLong { .. })));
    let error = Config::load(&dir).unwrap_err().to_string();
    assert!(
        error.ends_with(": is a directory; give a file, or /dev/stdin"),
        "{error}"
    );
    std::fs::remove_dir_all(dir).unwrap();
}

fn word() -> impl Strategy<Value = String> {
    "[a-z0-9/._-]{1,12}"
}

fn config() -> impl Strategy<Value = Config> {
    let disk =
        (word(), any::<bool>(), proptest::option::of(any::<u16>())).prop_map(|(path, readonly, queues)| {
            Disk {
                path: path.into(),
                readonly,
                queues,
                limit: Rates::default(),
            }
        });
    let backend = prop_oneof![
        word().prop_map(Backend::Tap),
        any::<u32>().prop_map(Backend::Fd),
        word().prop_map(|path| Backend::Passt(path.into())),
    ];
    let net = (
        backend,
        proptest::option::of(any::<[u8; 6]>()),
        proptest::option::of(any::<u16>()),
    )
        .prop_map(|(backend, mac, queues)| Net {
            backend,
            mac: mac.map(Mac),
            queues,
            rx_limit: Rates::default(),
            tx_limit: Rates::default(),
        });
    let console = prop_oneof![
        Just(Console::Stdio),
        Just(Console::None),
        word().prop_map(|path| Console::File(path.into())),
    ];
    let devices = (
        proptest::collection::vec(disk, 0..4),
        proptest::collection::vec(net, 0..4),
        proptest::option::of((any::<u32>(), word())),
        any::<bool>(),
        proptest::option::of(console),
    );
    let snp = (
        proptest::option::of(any::<u64>()),
        proptest::option::of(any::<[u8; 32]>()),
    );
    let sizes = (
        proptest::option::of(any::<u64>()),
        proptest::option::of(any::<u32>()),
    );
    (sizes, devices, snp).prop_map(
        |((memory, cpus), (disks, nets, vsock, rng, console), (policy, data))| Config {
            memory: memory.map(Size),
            cpus,
            devices: Devices {
                disks,
                nets,
                vsock: vsock.map(|(cid, uds)| Vsock { cid, uds: uds.into() }),
                rng,
                console,
            },
            snp: Snp {
                policy: policy.map(Policy),
                host_data: data.map(Blob),
                ..Snp::default()
            },
            ..Config::default()
        },
    )
}

/// The flags that mean `config`.
fn flags(config: &Config) -> Vec<String> {
    let mut flags = vec!["cvmm".to_owned()];
    let mut flag = |name: &str, value: String| flags.push(format!("--{name}={value}"));
    if let Some(memory) = config.memory {
        flag("memory", memory.to_string());
    }
    if let Some(cpus) = config.cpus {
        flag("cpus", cpus.to_string());
    }
    for disk in &config.devices.disks {
        let ro = if disk.readonly { ",ro" } else { "" };
        let queues = disk.queues.map_or_else(String::new, |n| format!(",queues={n}"));
        flag("disk", format!("{}{ro}{queues}", disk.path.display()));
    }
    for net in &config.devices.nets {
        let backend = match &net.backend {
            Backend::Tap(name) => format!("tap={name}"),
            Backend::Fd(n) => format!("fd={n}"),
            Backend::Passt(path) => format!("passt={}", path.display()),
        };
        let mac = net.mac.map_or_else(String::new, |mac| format!(",mac={mac}"));
        let queues = net.queues.map_or_else(String::new, |n| format!(",queues={n}"));
        flag("net", format!("{backend}{mac}{queues}"));
    }
    if let Some(Vsock { cid, uds }) = &config.devices.vsock {
        flag("vsock", format!("cid={cid},uds={}", uds.display()));
    }
    if let Some(console) = &config.devices.console {
        flag("console", console.to_string());
    }
    if let Some(policy) = config.snp.policy {
        flag("policy", policy.to_string());
    }
    if let Some(data) = config.snp.host_data {
        flag("host-data", data.to_string());
    }
    if config.devices.rng {
        flags.push("--rng".into());
    }
    flags
}

proptest! {
    #[test]
    fn every_configuration_survives_json_and_flags(config in config()) {
        let json = serde_json::to_string(&config).unwrap();
        prop_assert_eq!(serde_json::from_str::<Config>(&json).unwrap(), config.clone());
        let parsed = Flags::try_parse_from(flags(&config)).map(|flags| flags.config);
        prop_assert_eq!(parsed.unwrap(), config);
    }

    #[test]
    fn no_text_makes_a_parser_panic(text in ".{0,40}") {
        let _ = text.parse::<Size>().is_ok();
        let _ = text.parse::<Disk>().is_ok();
        let _ = text.parse::<Net>().is_ok();
        let _ = text.parse::<Vsock>().is_ok();
        let _ = text.parse::<Console>().is_ok();
        let _ = text.parse::<EventSink>().is_ok();
        let _ = text.parse::<Mac>().is_ok();
        let _ = text.parse::<Blob32>().is_ok();
        let _ = text.parse::<Policy>().is_ok();
        let _ = from_json(&text).is_ok();
    }
}
