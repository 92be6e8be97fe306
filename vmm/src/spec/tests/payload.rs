//! Kernel, initrd, command line, memory and processors.

use super::*;

#[test]
#[expect(clippy::too_many_lines, reason = "a table may be long")]
fn kernel_and_initrd() {
    let place = Place::new("payload");
    fs::write(place.path("text"), "hello").unwrap();
    let mut old = bzimage::tests::kernel();
    old[0x206] = 0x0a;
    fs::write(place.path("old"), old).unwrap();
    let big = place.sized("big", 600 << 20);
    let huge = place.sized("huge", 4 << 30);
    let empty = place.sized("empty", 0);
    let at = |name: &'static str| Some(place.path(name));
    check(
        &place,
        vec![
            (
                "no kernel",
                Box::new(|c| c.boot.kernel = None),
                "no kernel given; add --kernel PATH, for example --kernel /boot/vmlinuz-$(uname -r)",
                2,
            ),
            (
                "absent kernel",
                Box::new(|c| c.boot.kernel = at("absent")),
                "kernel DIR/absent: not found; check the path",
                2,
            ),
            (
                "a directory",
                Box::new(|c| c.boot.kernel = Some(place.0.clone())),
                "kernel DIR: is a directory; give a file",
                2,
            ),
            (
                "a device",
                Box::new(|c| c.boot.kernel = Some("/dev/null".into())),
                "kernel /dev/null: is a character device; give a file",
                2,
            ),
            (
                "empty kernel",
                Box::new(|c| c.boot.kernel = Some(empty.clone())),
                "kernel DIR/empty: is empty; copy it again",
                2,
            ),
            (
                "no bzImage",
                Box::new(|c| c.boot.kernel = at("text")),
                "kernel DIR/text: not a bzImage (no `HdrS` signature); give the distribution's vmlinuz, not vmlinux \
                 or an EFI program",
                2,
            ),
            (
                "old protocol",
                Box::new(|c| c.boot.kernel = at("old")),
                "kernel DIR/old: boot protocol 2.10 is older than 2.12; give a kernel of Linux 3.8 or newer",
                2,
            ),
            (
                "absent initrd",
                Box::new(|c| c.boot.initrd = at("absent")),
                "initrd DIR/absent: not found; check the path",
                2,
            ),
            (
                "initrd larger than memory",
                Box::new(|c| c.boot.initrd = Some(big.clone())),
                "memory: 512M cannot hold the kernel and an initrd of 600 MiB; give at least --memory 672M",
                2,
            ),
            (
                "initrd larger than low memory",
                Box::new(|c| {
                    c.boot.initrd = Some(huge.clone());
                    c.memory = Some(Size(8 << 30));
                }),
                "initrd DIR/huge: 4096 MiB cannot be placed below 3 GiB; give a smaller one",
                2,
            ),
            (
                "long command line",
                Box::new(|c| c.boot.cmdline = Some("x".repeat(2048))),
                "cmdline: 2048 bytes are more than the 2047 that the kernel takes; shorten it",
                2,
            ),
            (
                "NUL in the command line",
                Box::new(|c| c.boot.cmdline = Some("a\0b".into())),
                "cmdline: contains a NUL byte; remove it",
                2,
            ),
        ],
    );
}

#[test]
fn memory_and_cpus() {
    let place = Place::new("size");
    let cases: [(u64, &str); 5] = [
        (
            0,
            "memory: 0 bytes are less than 64M; give for example --memory 512M",
        ),
        (
            512,
            "memory: 512 bytes are less than 64M; give for example --memory 512M",
        ),
        (
            (64 << 20) + 4096,
            "memory: 65540K is not a multiple of 2M; give --memory 64M or 66M",
        ),
        (
            17 << 30,
            "memory: 17G is more than this host has; give --memory 16G or less",
        ),
        (
            441 << 30,
            "memory: 441G is more than the 440G of a machine; give --memory 440G or less",
        ),
    ];
    for (bytes, message) in cases {
        let mut config = place.config();
        config.memory = Some(Size(bytes));
        assert_eq!(place.refuse(config), (message.to_owned(), 2));
    }
    for (cpus, most) in [(0, 128), (129, 128), (5000, 128)] {
        let mut config = place.config();
        config.cpus = Some(cpus);
        let message = format!("cpus: {cpus} is not between 1 and {most}; give --cpus N in that range");
        assert_eq!(place.refuse(config), (message, 2));
    }
}
