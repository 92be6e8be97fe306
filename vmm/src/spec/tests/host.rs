//! What the host has to have; SNP options; a machine that resolves.

use std::fs::File;
use std::io;

use super::*;
use ::tdx::qgs::Address;

use crate::config::{Attributes, Blob, Policy, QuoteService, Snp, Tdx};

#[test]
fn a_good_machine_resolves_with_everything_open() {
    let place = Place::new("good");
    let mut config = place.config();
    config.boot.initrd = Some(place.sized("initrd", 3 << 20));
    config.devices.disks = vec![
        disk(&place.sized("a", 1 << 20), false),
        disk(&place.sized("b", 512), true),
        disk(&place.path("b"), true),
    ];
    config.devices.vsock = Some(Vsock {
        cid: 3,
        uds: place.path("vsock"),
    });
    config.devices.console = Some(Console::File(place.path("log")));
    let spec = MachineSpec::resolve(config, facts()).unwrap();
    let parts = spec.parts();
    assert_eq!((parts.memory_bytes, parts.cpus), (512 << 20, 1));
    assert_eq!(parts.payload.cmdline, "console=ttyS0");
    let sizes: Vec<_> = parts
        .devices
        .disks
        .iter()
        .map(|d| (d.bytes, d.readonly))
        .collect();
    assert_eq!(sizes, [(1 << 20, false), (512, true), (512, true)]);
    assert!(place.path("log").exists());
    assert!(matches!(parts.platform, PlatformSpec::Soft));
    let vsock = parts.devices.vsock.as_ref().unwrap();
    assert_eq!((vsock.cid, &vsock.uds), (3, &place.path("vsock")));
}

#[test]
fn hosts_without_what_is_asked_for() {
    let place = Place::new("host");
    let host = |platform, kvm: Result<u32, io::ErrorKind>| {
        let mut config = place.config();
        config.platform = Some(platform);
        let mut facts = facts();
        match kvm {
            Ok(types) => {
                facts.kvm = facts.kvm.map(|kvm| Capabilities {
                    vm_types: types,
                    ..kvm
                })
            }
            Err(kind) => facts.kvm = Err(kind.into()),
        }
        let error = MachineSpec::resolve(config, facts).unwrap_err();
        (error.to_string(), error.class() as u8)
    };
    let no_snp = "this CPU has no SEV-SNP; it takes an AMD EPYC of the 7003 series or later";
    let no_tdx = "this CPU has no TDX; it takes an Intel Xeon of the 5th generation or later";
    let cases = [
        (
            host(PlatformName::Soft, Err(io::ErrorKind::NotFound)),
            "/dev/kvm: not found; load kvm_amd or kvm_intel, or enable virtualisation in the firmware (`cvmm doctor` \
             tells more)"
                .to_owned(),
        ),
        (
            host(PlatformName::Soft, Err(io::ErrorKind::PermissionDenied)),
            "/dev/kvm: permission denied; add this user to the group kvm (`usermod -aG kvm $USER`, then log in again)"
                .to_owned(),
        ),
        (host(PlatformName::Snp, Ok(1)), format!("platform snp: {no_snp}")),
        (
            host(PlatformName::Auto, Ok(1)),
            format!(
                "platform auto: this host can protect no guest (for SEV-SNP: {no_snp}; for TDX: {no_tdx}); for a \
                 guest without any protection say --platform soft"
            ),
        ),
        (host(PlatformName::Tdx, Ok(1)), format!("platform tdx: {no_tdx}")),
    ];
    for (got, message) in cases {
        assert_eq!(got, (message, 20));
    }
}

#[test]
fn options_of_tdx() {
    let place = Place::new("tdx");
    let on_tdx = |platform, tdx| {
        let mut config = place.config();
        config.platform = Some(platform);
        config.tdx = tdx;
        let mut facts = facts();
        facts.tdx = Some(Ok(()));
        (config, facts)
    };
    for platform in [PlatformName::Tdx, PlatformName::Auto] {
        let options = Tdx {
            mrconfigid: Some(Blob([0xc1; 48])),
            td_attributes: Some(Attributes(0x9000_0000)),
            ..Tdx::default()
        };
        let (config, facts) = on_tdx(platform, options);
        let spec = MachineSpec::resolve(config, facts).unwrap();
        let PlatformSpec::Tdx(spec) = &spec.parts().platform else {
            panic!("not TDX");
        };
        assert_eq!(spec.config.attributes, 0x9000_0000);
        assert_eq!(
            (spec.config.mrconfigid, spec.config.mrowner),
            ([0xc1; 48], [0; 48])
        );
    }

    let (mut config, facts) = on_tdx(PlatformName::Tdx, Tdx::default());
    config.snp.policy = Some(Policy(0x3_0000));
    let error = MachineSpec::resolve(config, facts).unwrap_err();
    let message = "--policy: only an SNP guest has it; add --platform snp or remove it";
    assert_eq!((error.to_string().as_str(), error.class() as u8), (message, 2));

    let mut soft = place.config();
    soft.tdx.mrowner = Some(Blob([0; 48]));
    let message = "--mrowner: only a TDX guest has it; add --platform tdx or remove it";
    assert_eq!(place.refuse(soft), (message.to_owned(), 2));
}

#[test]
fn a_quote_service_is_a_socket_or_comes_later() {
    let place = Place::new("quotes");
    fs::write(place.path("file"), "").unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(place.path("socket")).unwrap();
    let resolve = |service: QuoteService| {
        let mut config = place.config();
        config.platform = Some(PlatformName::Tdx);
        config.tdx.quote_service = Some(service);
        let mut facts = facts();
        facts.tdx = Some(Ok(()));
        MachineSpec::resolve(config, facts)
    };
    for name in ["socket", "later"] {
        let path = place.path(name);
        let spec = resolve(QuoteService::Unix(path.clone())).unwrap();
        let PlatformSpec::Tdx(spec) = &spec.parts().platform else {
            panic!("not TDX");
        };
        assert_eq!(spec.quotes, Some(Address::Unix(path)));
    }
    let long = place.path(&"x".repeat(110));
    let cases = [
        (
            place.path("file"),
            "quote-service DIR/file: is a regular file; give the socket of the QGS",
        ),
        (
            place.path("."),
            "quote-service DIR/.: is a directory; give the socket of the QGS",
        ),
        (
            long,
            "bytes are more than the 107 of a socket path; give a shorter one",
        ),
    ];
    for (path, says) in cases {
        let error = resolve(QuoteService::Unix(path)).unwrap_err();
        let text = error.to_string().replace(place.0.to_str().unwrap(), "DIR");
        assert!(text.contains(says), "{text}");
        assert_eq!(error.class(), ExitClass::Usage);
    }
}

#[test]
fn options_of_snp() {
    let place = Place::new("snp");
    let offered = |features, policy| {
        let mut facts = facts();
        facts.snp = Some(Ok(crate::spec::host::SnpHost {
            sev: std::sync::Arc::new(File::open("/dev/null").unwrap()),
            offered: ::snp::host::Offered {
                features,
                policy,
                certificates: false,
            },
        }));
        facts
    };
    let with = |snp: Snp| {
        let mut config = place.config();
        config.platform = Some(PlatformName::Snp);
        config.snp = snp;
        config
    };
    let refuse = |snp, facts| {
        let error = MachineSpec::resolve(with(snp), facts).unwrap_err();
        (error.to_string(), error.class() as u8)
    };
    let good = MachineSpec::resolve(with(Snp::default()), offered(0, 0x3_0000)).unwrap();
    let PlatformSpec::Snp(spec) = &good.parts().platform else {
        panic!("not SNP");
    };
    assert_eq!(spec.config.policy.bits(), 0x3_0000);

    let policy = Some(Policy(0x1_0000));
    let (text, code) = refuse(
        Snp {
            policy,
            ..Snp::default()
        },
        offered(0, 0x3_0000),
    );
    assert!(
        text.starts_with("policy: 0x10000 is not a guest policy: bit 17 must be set"),
        "{text}"
    );
    assert_eq!(code, 2);

    let tsc = Snp {
        secure_tsc: true,
        ..Snp::default()
    };
    let (text, _) = refuse(tsc.clone(), offered(0x20, 0x3_0000));
    assert!(text.contains("does not offer secure-tsc"), "{text}");

    let half = Snp {
        id_block: Some("b".into()),
        ..Snp::default()
    };
    let (text, _) = refuse(half, offered(0, 0x3_0000));
    assert_eq!(
        text,
        "--id-block: needs --id-auth too; `cvmm id-block` makes both"
    );

    let short = place.sized("short", 10);
    let both = Snp {
        id_block: Some(short.clone()),
        id_auth: Some(short),
        ..Snp::default()
    };
    let (text, _) = refuse(both, offered(0, 0x3_0000));
    assert!(
        text.ends_with("/short: an ID block has 96 bytes, this one has 10"),
        "{text}"
    );

    let mut soft = place.config();
    soft.snp = tsc;
    let message = "--secure-tsc: only an SNP guest has it; add --platform snp or remove it";
    assert_eq!(place.refuse(soft), (message.to_owned(), 2));
}
