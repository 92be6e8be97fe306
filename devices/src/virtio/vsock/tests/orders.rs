//! Events in any order.

use super::*;

/// One step of a hostile day.
#[derive(Clone, Debug)]
enum Step {
    Packet {
        host: u32,
        guest: u32,
        op: u16,
        flags: u32,
        len: u32,
        payload: usize,
        room: u32,
        forwarded: u32,
    },
    Connect(u32),
    Line(Vec<u8>),
    Write(usize, usize),
    Read(usize),
    Shut(usize, bool),
    Close(usize),
    Buffers(u16),
    Reset,
}

fn step() -> impl proptest::strategy::Strategy<Value = Step> {
    use proptest::prelude::*;
    let size = prop_oneof![Just(0_u32), 1_u32..5000, Just(WINDOW), any::<u32>()];
    let packet = (
        0_u32..4,
        0_u32..3,
        0_u16..9,
        0_u32..5,
        size.clone(),
        0_usize..9000,
        size,
        0_u32..9000,
    );
    let packet = packet.prop_map(
        |(host, guest, op, flags, len, payload, room, forwarded)| Step::Packet {
            host,
            guest,
            op,
            flags,
            // Mostly honest lengths.
            len: if len.is_multiple_of(4) {
                len
            } else {
                payload as u32
            },
            payload,
            room,
            forwarded,
        },
    );
    prop_oneof![
        12 => packet,
        3 => (0_u32..3).prop_map(Step::Connect),
        1 => proptest::collection::vec(any::<u8>(), 0..50).prop_map(Step::Line),
        4 => (0_usize..8, 1_usize..300_000).prop_map(|(i, len)| Step::Write(i, len)),
        3 => (0_usize..8).prop_map(Step::Read),
        1 => (0_usize..8, any::<bool>()).prop_map(|(i, write)| Step::Shut(i, write)),
        1 => (0_usize..8).prop_map(Step::Close),
        3 => (0_u16..40).prop_map(Step::Buffers),
        1 => Just(Step::Reset),
    ]
}

/// The guest's side of a hostile day.
struct Day {
    guest: Guest,
    listener: UnixListener,
    sockets: Vec<UnixStream>,
    /// Keys on which the device has asked for a connection.
    asked: Vec<Key>,
    posted: u16,
}

impl Day {
    fn run(&mut self, step: Step) {
        let guest = &mut self.guest;
        let count = self.sockets.len().max(1);
        match step {
            Step::Packet {
                host,
                guest: port,
                op,
                flags,
                len,
                payload,
                room,
                forwarded,
            } => {
                // Host port 0 stands for the last connection that a process asked for.
                let key = match self.asked.last() {
                    Some(key) if host == 0 => *key,
                    _ => Key {
                        host: 6 + host,
                        guest: port,
                    },
                };
                let header = Header {
                    buf_alloc: room,
                    fwd_cnt: forwarded,
                    ..guest.packet(key, op, flags, len)
                };
                guest.put(&header, &vec![op as u8; payload]);
            }
            Step::Connect(port) => {
                let mut socket = UnixStream::connect(&guest.path).unwrap();
                socket.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
                self.sockets.push(socket);
            }
            Step::Line(line) => {
                let mut socket = UnixStream::connect(&guest.path).unwrap();
                socket.write_all(&line).unwrap();
                self.sockets.push(socket);
            }
            Step::Write(i, len) => {
                if let Some(mut socket) = self.sockets.get(i % count) {
                    socket.set_nonblocking(true).unwrap();
                    let _ = socket.write(&vec![1; len]);
                }
            }
            Step::Read(i) => {
                if let Some(mut socket) = self.sockets.get(i % count) {
                    socket.set_nonblocking(true).unwrap();
                    let _ = socket.read(&mut vec![0; 300_000]);
                }
            }
            Step::Shut(i, write) => {
                if let Some(socket) = self.sockets.get(i % count) {
                    let _ = socket.shutdown(if write { Shutdown::Write } else { Shutdown::Read });
                }
            }
            Step::Close(i) if i < self.sockets.len() => drop(self.sockets.swap_remove(i)),
            Step::Close(_) => {}
            Step::Buffers(count) if self.posted == 0 => {
                guest.post(count);
                self.posted = count;
            }
            Step::Buffers(_) => {
                let packets = guest.arrived();
                let requests = packets.iter().filter(|(header, _)| header.op == op::REQUEST);
                self.asked.extend(requests.map(|(header, _)| Key {
                    host: header.src_port,
                    guest: header.dst_port,
                }));
            }
            Step::Reset => {
                guest.running = None;
                guest.start();
                self.posted = 0;
            }
        }
    }
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(150))]
    #[test]
    fn no_order_of_events_stops_spins_or_bloats_the_device(steps in proptest::collection::vec(step(), 1..120)) {
        let guest = guest();
        let (listener, service) = guest.service(7);
        listener.set_nonblocking(true).unwrap();
        let mut day = Day { guest, listener, sockets: vec![], asked: vec![], posted: 0 };
        for step in steps {
            day.run(step);
            day.guest.settle();
            day.sockets.extend(day.listener.accept().map(|(socket, _)| socket));
            let held = day.guest.running.as_mut().unwrap().mux.held();
            proptest::prop_assert!(held <= day.sockets.len().max(20) * WINDOW as usize);
        }
        // When all processes are gone and the guest resets what it knows of, only the time limit is left.
        day.sockets.clear();
        drop(day.listener);
        std::fs::remove_file(service).unwrap();
        if day.posted == 0 {
            day.guest.post(32);
        }
        day.guest.receive();
        for host in 6..10 {
            day.asked.extend((0..3).map(|guest| Key { host, guest }));
        }
        for key in day.asked {
            day.guest.send(key, op::RST, 0, &[]);
        }
        let mux = &mut day.guest.running.as_mut().unwrap().mux;
        mux.expire(Instant::now() + TIME_LIMIT);
        day.guest.receive();
        day.guest.running.as_mut().unwrap().mux.expire(Instant::now() + TIME_LIMIT);
        let left = day.guest.running.as_mut().unwrap().mux.len();
        proptest::prop_assert_eq!(left, 0);
    }
}
