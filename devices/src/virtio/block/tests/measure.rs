//! What a request costs, by engine, file system (`TMPDIR`), size and depth:
//! `cargo test --release -p devices cost_of_requests -- --ignored --nocapture`

use rustix::time::{ClockId, clock_gettime};

use super::*;

fn cpu_us() -> f64 {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    now.tv_sec as f64 * 1e6 + now.tv_nsec as f64 / 1e3
}

/// Runs `count` requests of `bytes`, `depth` at a time, and returns CPU and wall time of one in microseconds.
fn cost(rig: &mut Rig, kind: u32, bytes: u32, depth: u16, count: u32) -> (f64, f64) {
    let disk_sectors = rig.block.capacity_bytes() / 512;
    let flags = if kind == IN { WRITE } else { 0 };
    let (start, cpu) = (Instant::now(), cpu_us());
    let mut sector = 0;
    for _ in 0..count / u32::from(depth) {
        for i in 0..depth {
            let at = HIGH + u64::from(i) * 32;
            rig.mem
                .write_slice(&header(kind, sector), GuestAddress(at))
                .unwrap();
            sector = (sector + u64::from(bytes) / 512) % disk_sectors;
            let data = RING + 0x1_0000 + u64::from(i) * u64::from(bytes);
            rig.ring.descriptor(i * 3, at, 16, NEXT, i * 3 + 1);
            rig.ring
                .descriptor(i * 3 + 1, data, bytes, flags | NEXT, i * 3 + 2);
            rig.ring.descriptor(i * 3 + 2, at + 16, 1, WRITE, 0);
            rig.ring.offer(i * 3);
        }
        rig.kick().unwrap();
        for _ in 0..depth {
            rig.wait();
        }
    }
    let count = f64::from(count / u32::from(depth) * u32::from(depth));
    (
        (cpu_us() - cpu) / count,
        start.elapsed().as_secs_f64() * 1e6 / count,
    )
}

#[test]
#[ignore = "a measurement, run by hand"]
fn cost_of_requests() {
    println!("{:28} CPU µs  wall µs", std::env::temp_dir().display());
    for (bytes, depth, count) in [
        (4096, 1, 20_000),
        (4096, 16, 40_000),
        (1 << 20, 1, 400),
        (1 << 20, 8, 400),
    ] {
        for (name, make) in ENGINES {
            for (what, kind) in [("read", IN), ("write", OUT)] {
                let mut rig = Rig::open(&disk_file(64 << 20), false, ALL, make).unwrap();
                cost(&mut rig, kind, bytes, depth, count / 10);
                let (cpu, wall) = cost(&mut rig, kind, bytes, depth, count);
                println!(
                    "{name:9} {what:5} {:4}k x{depth:2}  {cpu:8.1} {wall:8.1}",
                    bytes / 1024
                );
            }
        }
    }
}

#[test]
#[ignore = "a measurement, run by hand"]
fn cost_of_opening() {
    let file = disk_file(1 << 20);
    for queues in [1, 4] {
        let cpu = cpu_us();
        for _ in 0..200 {
            Block::open(file.try_clone().unwrap(), false, queues, ID, &free()).unwrap();
        }
        println!(
            "{queues} queues  {:8.1} CPU µs with closing",
            (cpu_us() - cpu) / 200.0
        );
    }
}

/// The longest time for which one request of 796 MiB, or a range of 2 GiB to be zeroed, holds up conversions.
#[test]
#[ignore = "a measurement, run by hand"]
fn longest_turn() {
    let block = vec![5; 64 << 20];
    for (name, make) in ENGINES {
        for (what, kind) in [("read", IN), ("write", OUT), ("zero", WRITE_ZEROES)] {
            let file = disk_file(512);
            for at in (0..2 << 30).step_by(block.len()) {
                file.write_all_at(&block, at).unwrap();
            }
            let mut rig = Rig::open(&file, false, ALL, make).unwrap();
            rig.begin_again(256);
            if kind == WRITE_ZEROES {
                rig.ring.send(&[&header(kind, 0), &range(0, 4 << 20, 1)], &[1]);
            } else {
                rig.offer_large(kind, 199);
            }
            let (mut longest, mut turns, mut began) = (Duration::ZERO, 1, Instant::now());
            rig.kick().unwrap();
            loop {
                longest = longest.max(began.elapsed());
                if rig.ring.take_used().is_some() {
                    break;
                }
                while !readable(&rig.block, 100) {}
                turns += 1;
                began = Instant::now();
                rig.backend().unwrap();
            }
            println!("{name:9} {what:5} longest of {turns} turns: {longest:?}");
        }
    }
}
