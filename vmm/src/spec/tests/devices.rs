//! Disks and network cards.

use std::fs::File;
use std::io;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use super::*;
use crate::config::{Backend, Mac, Net};

fn net(backend: Backend) -> Net {
    Net {
        backend,
        mac: None,
        queues: None,
        rx_limit: Default::default(),
        tx_limit: Default::default(),
    }
}

#[test]
fn disks() {
    let place = Place::new("disk");
    let good = place.sized("good", 4096);
    let link = place.path("link");
    symlink(&good, &link).unwrap();
    let odd = place.sized("odd", 1000);
    let empty = place.sized("none", 0);
    let taken = place.sized("taken", 4096);
    let holder = File::open(&taken).unwrap();
    holder.try_lock_shared().unwrap();
    let twice = "given twice and not read-only both times; remove one or add ,ro to both";
    let busy = "in use by another process; stop that one, or give every user of it ,ro";
    let absent = place.path("absent");
    check(
        &place,
        vec![
            (
                "absent",
                Box::new(|c| c.devices.disks = vec![disk(&absent, false)]),
                "disk DIR/absent: not found; check the path, or create it with `truncate -s SIZE`",
                2,
            ),
            (
                "a directory",
                Box::new(|c| c.devices.disks = vec![disk(&place.0, true)]),
                "disk DIR: is a directory; give a raw image or a block device",
                2,
            ),
            (
                "odd size",
                Box::new(|c| c.devices.disks = vec![disk(&odd, true)]),
                "disk DIR/odd: 1000 bytes are not a multiple of 512; if it is a raw image, pad it with \
                 `truncate -s %512 DIR/odd`",
                2,
            ),
            (
                "empty",
                Box::new(|c| c.devices.disks = vec![disk(&empty, true)]),
                "disk DIR/none: is empty; make it larger, for example `truncate -s 1G DIR/none`",
                2,
            ),
            (
                "twice for writing",
                Box::new(|c| c.devices.disks = vec![disk(&good, false), disk(&good, false)]),
                &format!("disk DIR/good: {twice}"),
                2,
            ),
            (
                "once for reading, once for writing by another name",
                Box::new(|c| c.devices.disks = vec![disk(&good, true), disk(&link, false)]),
                &format!("disk DIR/link: {twice}"),
                2,
            ),
            (
                "locked by another process",
                Box::new(|c| c.devices.disks = vec![disk(&taken, false)]),
                &format!("disk DIR/taken: {busy}"),
                21,
            ),
            (
                "queues",
                Box::new(|c| {
                    let queues = Some(17);
                    c.devices.disks = vec![Disk {
                        queues,
                        ..disk(&good, false)
                    }];
                }),
                "disk DIR/good: 17 queues are not between 1 and 16; give queues=N in that range",
                2,
            ),
        ],
    );
}

#[test]
fn two_machines_cannot_write_one_disk_but_can_read_it() {
    let place = Place::new("lock");
    let image = place.sized("image", 4096);
    let with = |readonly| {
        let mut config = place.config();
        config.devices.disks = vec![disk(&image, readonly)];
        config
    };
    let writer = MachineSpec::resolve(with(false), facts()).unwrap();
    assert_eq!(place.refuse(with(false)).1, 21);
    assert_eq!(place.refuse(with(true)).1, 21);
    drop(writer);
    let _readers = [(); 2].map(|()| MachineSpec::resolve(with(true), facts()).unwrap());
    assert_eq!(place.refuse(with(false)).1, 21);
}

#[test]
fn nets() {
    let place = Place::new("net");
    let number = {
        use std::os::fd::AsRawFd;
        // Nobody opens descriptors this high, so this number is closed.
        u32::try_from(io::stderr().as_raw_fd()).unwrap() + 900
    };
    let closed = format!(
        "net fd {number}: not an open descriptor; let the process that starts cvmm pass it on, as in \
         `cvmm … {number}<>FILE`"
    );
    check(
        &place,
        vec![
            (
                "absent tap",
                Box::new(|c| c.devices.nets = vec![net(Backend::Tap("cvmm-none".into()))]),
                "net tap=cvmm-none: no such interface; create it with `ip tuntap add cvmm-none mode tap && ip link \
                 set cvmm-none up`",
                2,
            ),
            (
                "not a tap",
                Box::new(|c| c.devices.nets = vec![net(Backend::Tap("lo".into()))]),
                "net tap=lo: not a tap interface; create one with `ip tuntap add NAME mode tap`",
                2,
            ),
            (
                "long name",
                Box::new(|c| c.devices.nets = vec![net(Backend::Tap("sixteen-letters-".into()))]),
                "net tap=sixteen-letters-: not the name of an interface (1 to 15 bytes, no `/` or space); see \
                 `ip link`",
                2,
            ),
            (
                "path as name",
                Box::new(|c| c.devices.nets = vec![net(Backend::Tap("../x".into()))]),
                "net tap=../x: not the name of an interface (1 to 15 bytes, no `/` or space); see `ip link`",
                2,
            ),
            (
                "closed descriptor",
                Box::new(|c| c.devices.nets = vec![net(Backend::Fd(number))]),
                &closed,
                2,
            ),
            (
                "absent passt",
                Box::new(|c| c.devices.nets = vec![net(Backend::Passt("/nonexistent".into()))]),
                "net passt=/nonexistent: no socket; start passt first, as in `passt --socket /nonexistent`",
                2,
            ),
        ],
    );
}

#[test]
fn net_addresses_and_queues() {
    let place = Place::new("mac");
    let socket = place.path("passt");
    let _listener = UnixListener::bind(&socket).unwrap();
    let passt = || net(Backend::Passt(socket.clone()));
    let mac = |first| Some(Mac([first, 0, 0, 0, 0, 1]));
    check(
        &place,
        vec![
            (
                "one host side twice",
                Box::new(|c| c.devices.nets = vec![passt(), passt()]),
                "net passt=DIR/passt: given twice; remove one",
                2,
            ),
            (
                "multicast address",
                Box::new(|c| {
                    c.devices.nets = vec![Net {
                        mac: mac(3),
                        ..passt()
                    }]
                }),
                "net mac=03:00:00:00:00:01: a multicast or zero address; give one whose first byte is even, for \
                 example 02:00:00:00:00:01",
                2,
            ),
            (
                "more queues than passt has",
                Box::new(|c| {
                    c.devices.nets = vec![Net {
                        queues: Some(2),
                        ..passt()
                    }]
                }),
                "net passt=DIR/passt: 2 queues are not between 1 and 1; give queues=N in that range",
                2,
            ),
        ],
    );
    let mut config = place.config();
    config.devices.nets = vec![passt()];
    let address = |config| {
        let spec = MachineSpec::resolve(config, facts()).unwrap();
        spec.parts().devices.nets[0].mac
    };
    let first = address(config.clone());
    assert_eq!(first.bytes()[0], 2);
    assert_eq!(address(config), first, "the address is the same in every run");
}

#[test]
fn too_many_devices() {
    let place = Place::new("many");
    let image = place.sized("image", 512);
    let mut config = place.config();
    config.devices.disks = vec![disk(&image, true); 32];
    let message = "32 devices are more than the 31 of a machine; remove some";
    assert_eq!(place.refuse(config), (message.to_owned(), 2));
}
