//! Engines that come to rest, and who waits for them.

use super::*;

#[test]
fn a_conversion_waits_while_an_operation_is_in_flight() {
    each(1 << 20, |name, rig| {
        let page = PageRange::new(Gpa(0x4000), 0x1000).unwrap();
        let segments = [(Gpa(0x4000), 0x1000)];
        let read = Action::Read {
            offset: 0,
            segments: &segments,
        };
        // Submitted, not run: the operation is certainly not over.
        rig.engine.submit(&rig.mem, 1, read).unwrap();
        rig.visible.set(page, Visibility::Private);
        assert!(!rig.visible.drain(page, Duration::from_millis(2)), "{name}");
        assert!(rig.collect(1)[0].result.is_ok(), "{name}");
        assert!(rig.visible.drain(page, Duration::ZERO), "{name}");
        assert!(rig.engine.submit(&rig.mem, 1, read).is_err(), "{name}");
    });
}

#[test]
fn a_dropped_engine_leaves_nothing_in_flight() {
    // Past the page cache, so that the host's disk itself writes to the memory, and takes its time.
    let file = temp_file(libc::O_DIRECT).unwrap_or_else(|e| {
        eprintln!("SKIPPED: direct I/O is not available here: {e}");
        temp_file(0).unwrap()
    });
    let all = PageRange::new(Gpa(0), RAM_BYTES).unwrap();
    for (name, make) in ENGINES {
        let Ok(mut rig) = Rig::new(&file, make) else {
            eprintln!("SKIPPED: {name} is not available here");
            continue;
        };
        let fill = vec![0xaa; RAM_BYTES as usize];
        rig.mem.write_slice(&fill, GuestAddress(0)).unwrap();
        let segments = [(Gpa(0), RAM_BYTES as u32)];
        for offset in (0..8).map(|i| i << 20) {
            let write = Action::Write {
                offset,
                segments: &segments,
                durable: true,
            };
            rig.run(write).unwrap();
        }
        for round in 0..20_u64 {
            for tag in 0..8 {
                let read = Action::Read {
                    offset: tag << 20,
                    segments: &segments,
                };
                rig.engine.submit(&rig.mem, tag, read).unwrap();
            }
            if round % 4 != 0 {
                rig.engine.run(&mut vec![], &mut { COPIES }).unwrap();
            }
            rig.engine = rig.disk.inline_engine(1);
            assert!(rig.visible.drain(all, Duration::ZERO), "{name}");
            let zeros = vec![0; RAM_BYTES as usize];
            rig.mem.write_slice(&zeros, GuestAddress(0)).unwrap();
            std::thread::sleep(Duration::from_millis(2));
            let mut now = fill.clone();
            rig.mem.read_slice(&mut now, GuestAddress(0)).unwrap();
            assert!(
                now == zeros,
                "{name}: memory was written after the engine was gone"
            );
            rig.engine = make(&rig.disk).unwrap();
        }
    }
}

#[test]
fn an_engine_comes_to_rest_without_anybody_waiting_for_it() {
    each(1 << 20, |name, rig| {
        let all = PageRange::new(Gpa(0), RAM_BYTES).unwrap();
        let segments = [(Gpa(0), RAM_BYTES as u32)];
        for begun in [false, true] {
            let read = Action::Read {
                offset: 0,
                segments: &segments,
            };
            rig.engine.submit(&rig.mem, 1, read).unwrap();
            rig.engine.submit(&rig.mem, 2, Action::Flush).unwrap();
            if begun {
                rig.engine.run(&mut vec![], &mut { COPIES }).unwrap();
            }
            loop {
                rig.disk.acknowledge();
                if rig.engine.quiesce(Duration::ZERO) {
                    break;
                }
                wait_readable(&rig.disk, 5000);
            }
            assert_eq!(rig.engine.in_flight(), 0, "{name}");
            assert!(rig.visible.drain(all, Duration::ZERO), "{name}");
        }
    });
}

#[test]
fn what_no_thread_has_begun_is_taken_back() {
    let file = temp_file(0).unwrap();
    file.set_len(8192).unwrap();
    let (go, gate) = std::sync::mpsc::channel::<()>();
    let gate = std::sync::Mutex::new(gate);
    let late: Enter = Arc::new(move || {
        // Until the test drops the other end.
        let _end = gate.lock().unwrap().recv();
        Ok(())
    });
    let mut rig = Rig::new(&file, |disk| Ok(disk.inline_engine(8))).unwrap();
    rig.engine = rig.disk.thread_engine(8, &late);
    let segments = [(Gpa(0), 4096)];
    let read = Action::Read {
        offset: 0,
        segments: &segments,
    };
    rig.engine.submit(&rig.mem, 1, read).unwrap();
    rig.engine.run(&mut vec![], &mut { COPIES }).unwrap();
    assert!(rig.engine.quiesce(Duration::ZERO));
    let page = PageRange::new(Gpa(0), 4096).unwrap();
    assert!(rig.visible.drain(page, Duration::ZERO));
    drop(go);
    rig.run(read).unwrap();
}
