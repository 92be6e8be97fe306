//! Streams in both directions, with a driver that does what Linux does (net/vmw_vsock/virtio_transport.c and
//! virtio_transport_common.c), on a small scale.

mod talk;

use std::collections::VecDeque;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use super::super::mock::memory;
use super::super::served::{Lines, Outside, REST, Ring, Schedule, Wired, search};
use super::packet::{HEADER_BYTES, Header, Key, SHUT_BOTH, SHUT_SEND, STREAM, op};
use super::*;
use talk::{Phase, Talk, stretch};

const CID: u64 = 42;
const RX: usize = 0;
const TX: usize = 1;
/// Most connections of a schedule.
const MOST: usize = 4;
const PACKET: u32 = 64 << 10;
const SLOT: u64 = PACKET as u64 + 64;

/// A guest with its connections, and the processes behind them.
struct Guest {
    rings: Vec<Ring>,
    path: PathBuf,
    talks: Vec<Talk>,
    /// Connections so far.
    count: usize,
    /// Packets that wait for room in the ring.
    waiting: VecDeque<(Header, Vec<u8>)>,
    rx_due: bool,
    tx_due: bool,
    buffer: u32,
    /// Bytes that a guest process takes.
    room: u32,
    strayed: bool,
    /// Half of what the device takes.
    half: u32,
    /// Its work queue gets to what arrived once in so many steps.
    patience: usize,
    /// Largest packet that the guest sends.
    packet: u32,
}

/// A packet of the guest, without payload and credit.
fn to_host(key: Key, op: u16) -> Header {
    Header {
        src_cid: CID,
        dst_cid: 2,
        src_port: key.guest,
        dst_port: key.host,
        kind: STREAM,
        op,
        ..Header::default()
    }
}

impl Guest {
    fn queue(&mut self, at: usize, op: u16, flags: u32, payload: Vec<u8>) {
        let talk = &mut self.talks[at];
        talk.announced = talk.forwarded;
        let header = Header {
            len: payload.len() as u32,
            flags,
            buf_alloc: talk.room,
            fwd_cnt: talk.forwarded,
            ..to_host(talk.key, op)
        };
        self.waiting.push_back((header, payload));
    }

    /// `virtio_transport_send_pkt_work`.
    fn pump(&mut self) {
        let ring = &mut self.rings[TX];
        let mut added = false;
        while let (Some(head), Some((header, payload))) = (ring.next(), self.waiting.front()) {
            let at = ring.at(head);
            ring.write(at, &header.bytes());
            ring.write(at + HEADER_BYTES as u64, payload);
            ring.add(&[(at, (HEADER_BYTES + payload.len()) as u32, false)]);
            self.waiting.pop_front();
            added = true;
        }
        if added {
            ring.kick();
        }
    }

    /// `virtio_transport_tx_work`.
    fn tx_work(&mut self) {
        self.tx_due = false;
        loop {
            self.rings[TX].disable();
            while self.rings[TX].get().is_some() {}
            if self.rings[TX].enable() {
                break;
            }
        }
        self.pump();
    }

    /// `virtio_vsock_rx_fill`.
    fn fill(&mut self) {
        let ring = &mut self.rings[RX];
        while let Some(head) = ring.next() {
            ring.add(&[(ring.at(head), self.buffer, true)]);
        }
        ring.kick();
    }

    /// `virtio_transport_rx_work`.
    fn rx_work(&mut self, with: &Schedule) {
        self.rx_due = false;
        loop {
            self.rings[RX].disable();
            while let Some((head, len)) = self.rings[RX].get() {
                let at = self.rings[RX].at(head);
                let bytes = self.rings[RX].read(at, len as usize);
                let (header, payload) = bytes.split_first_chunk().unwrap();
                self.packet(&Header::parse(header), payload, with);
            }
            if self.rings[RX].enable() {
                break;
            }
        }
        if self.rings[RX].outstanding() < self.rings[RX].size() / 2 {
            self.fill();
        }
        self.pump();
    }

    fn packet(&mut self, header: &Header, payload: &[u8], with: &Schedule) {
        with.tell(|| {
            format!(
                "  guest gets op {} of {} with {}",
                header.op, header.dst_port, header.len
            )
        });
        let asked = |talk: &Talk| talk.key.host == 0 && talk.phase == Phase::Asked;
        let found = self.talks.iter().position(|talk| {
            talk.key.guest == header.dst_port
                && (talk.key.host == header.src_port || header.op == op::REQUEST && asked(talk))
        });
        let Some(at) = found.filter(|at| self.talks[*at].phase != Phase::Gone) else {
            return self.refuse(header);
        };
        let talk = &mut self.talks[at];
        (talk.peer_room, talk.peer_forwarded) = (header.buf_alloc, header.fwd_cnt);
        match header.op {
            op::REQUEST => {
                talk.key.host = header.src_port;
                talk.phase = Phase::Open;
                self.queue(at, op::RESPONSE, 0, vec![]);
            }
            op::RESPONSE => talk.phase = Phase::Open,
            op::RW => {
                if payload.len() > (talk.room as usize).saturating_sub(talk.inbox.len()) {
                    with.wrong(|| "more than the guest has room for".into());
                }
                talk.inbox.extend_from_slice(payload);
            }
            op::CREDIT_REQUEST => self.queue(at, op::CREDIT_UPDATE, 0, vec![]),
            op::SHUTDOWN => talk.peer_shut |= header.flags,
            op::RST => {
                if talk.guest_shut != SHUT_BOTH && !talk.host_ended {
                    with.wrong(|| format!("connection {} is reset", talk.id));
                }
                talk.phase = Phase::Gone;
            }
            _ => {}
        }
        self.close_if_done(at);
    }

    /// A packet of no connection.
    fn refuse(&mut self, header: &Header) {
        if header.op == op::RST {
            return;
        }
        let key = Key {
            host: header.src_port,
            guest: header.dst_port,
        };
        self.waiting.push_back((to_host(key, op::RST), vec![]));
    }

    /// Once the host has closed both directions and all is read, the guest resets.
    fn close_if_done(&mut self, at: usize) {
        let talk = &mut self.talks[at];
        if talk.phase == Phase::Open && talk.peer_shut == SHUT_BOTH && talk.inbox.is_empty() {
            talk.phase = Phase::Gone;
            self.queue(at, op::RST, 0, vec![]);
        }
    }

    /// A process of the guest reads; true if there was anything.
    fn read(&mut self, at: usize, count: usize, with: &Schedule) -> bool {
        let talk = &mut self.talks[at];
        let count = count.min(talk.inbox.len());
        let rest = talk.inbox.split_off(count);
        let bytes = std::mem::replace(&mut talk.inbox, rest);
        if bytes != stretch(talk.id, 1, talk.guest_read, count) {
            with.wrong(|| format!("the guest reads other bytes than the host sent on {}", talk.id));
        }
        talk.guest_read += count as u64;
        talk.forwarded = talk.forwarded.wrapping_add(count as u32);
        let free = talk
            .room
            .saturating_sub(talk.forwarded.wrapping_sub(talk.announced));
        // A quarter of the default room in Linux.
        if talk.phase == Phase::Open && count != 0 && free < talk.room / 4 {
            self.queue(at, op::CREDIT_UPDATE, 0, vec![]);
        }
        self.close_if_done(at);
        self.pump();
        count != 0
    }

    /// A process of the guest goes on writing as far as it has credit; true if it has.
    fn write(&mut self, at: usize) -> bool {
        let mut busy = false;
        // As many as Linux queues before a process has to wait.
        while self.waiting.len() < 300 {
            let talk = &mut self.talks[at];
            let most = talk.credit().min(talk.guest_piece).min(self.packet);
            let count = most.min(u32::try_from(talk.guest_writes).unwrap());
            let may = talk.phase == Phase::Open && talk.guest_shut & SHUT_SEND == 0 && talk.peer_hears();
            if !may || count == 0 {
                break;
            }
            let payload = stretch(talk.id, 0, talk.guest_wrote, count as usize);
            talk.sent = talk.sent.wrapping_add(count);
            talk.guest_wrote += u64::from(count);
            talk.guest_writes -= u64::from(count);
            self.queue(at, op::RW, 0, payload);
            busy = true;
        }
        self.pump();
        busy
    }

    /// Packets of no connection, once: as many as the device answers before it loses some.
    fn stray(&mut self) {
        let count = if std::mem::replace(&mut self.strayed, true) {
            0
        } else {
            RESETS - 4
        };
        let key = Key { host: 9, guest: 9 };
        let packet = to_host(key, op::RW);
        self.waiting.extend(std::iter::repeat_n((packet, vec![]), count));
        self.pump();
    }

    fn shut(&mut self, at: usize, flags: u32) {
        let talk = &mut self.talks[at];
        if talk.phase == Phase::Open && talk.guest_shut | flags != talk.guest_shut {
            talk.guest_shut |= flags;
            talk.guest_writes = 0;
            self.queue(at, op::SHUTDOWN, flags, vec![]);
            self.pump();
        }
    }

    fn connect_out(&mut self) {
        let id = self.count;
        self.count += 1;
        let port = 100 + id as u32;
        let path = PathBuf::from(format!("{}_{port}", self.path.display()));
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let key = Key {
            host: port,
            guest: 1000 + id as u32,
        };
        let mut talk = Talk::new(id, key, self.room);
        talk.listener = Some((listener, path));
        talk.greeting = b"\n".to_vec();
        self.talks.push(talk);
        self.queue(self.talks.len() - 1, op::REQUEST, 0, vec![]);
        self.pump();
    }

    fn connect_in(&mut self, with: &Schedule) {
        let id = self.count;
        self.count += 1;
        let key = Key {
            host: 0,
            guest: 1000 + id as u32,
        };
        let mut socket = UnixStream::connect(&self.path).unwrap();
        let request = format!("CONNECT {}\n", key.guest).into_bytes();
        let (now, later) = request.split_at(with.one(&[request.len(), 0, 4, 9]));
        socket.write_all(now).unwrap();
        socket.set_nonblocking(true).unwrap();
        let mut talk = Talk::new(id, key, self.room);
        talk.request = later.to_vec();
        talk.socket = Some(socket);
        self.talks.push(talk);
    }
}

impl Outside for Guest {
    fn rings(&mut self) -> &mut Vec<Ring> {
        &mut self.rings
    }

    fn begin(&mut self, with: &Schedule) {
        self.room = with.one(&[1000, 8 << 10, 256 << 10]);
        self.buffer = HEADER_BYTES as u32 + with.one(&[4096, 1000, 200]);
        self.patience = with.one(&[1, 2, 6]);
        (self.rx_due, self.tx_due) = (false, false);
        self.packet = (self.rings[TX].slot as u32 - 64).min(PACKET);
        self.strayed = false;
        self.waiting.clear();
        self.fill();
    }

    fn drive(&mut self, with: &Schedule) {
        if self.rx_due && with.pick(self.patience) == 0 {
            with.tell(|| "rx work".into());
            return self.rx_work(with);
        }
        if self.tx_due && with.pick(2) == 0 {
            with.tell(|| "tx work".into());
            return self.tx_work();
        }
        if self.talks.is_empty() || self.count < MOST && with.pick(8) == 0 {
            with.tell(|| "guest connects".into());
            return self.connect_out();
        }
        let at = with.pick(self.talks.len());
        match with.pick(16) {
            0..=5 => {
                let (count, piece) = with.one(&[
                    (1, 1),
                    (100, 100),
                    (1000, 1),
                    (20_000, self.half),
                    (400_000, PACKET),
                    (400_000, PACKET),
                ]);
                with.tell(|| format!("guest writes {count} to {at}, {piece} at a time"));
                let talk = &mut self.talks[at];
                if talk.guest_writes == 0 && talk.guest_shut == 0 {
                    (talk.guest_writes, talk.guest_piece) = (count, piece);
                }
                self.write(at);
            }
            6 => {
                with.tell(|| "guest sends stray packets".into());
                self.stray();
            }
            7 => drop(self.write(at)),
            8..=13 => {
                let count = with.one(&[1, 500, 5000, 1 << 20]);
                with.tell(|| format!("guest reads {count} from {at}"));
                self.read(at, count, with);
            }
            14 if with.pick(3) == 0 => {
                with.tell(|| format!("guest ends {at}"));
                self.shut(at, SHUT_SEND);
            }
            15 if with.pick(3) == 0 => {
                with.tell(|| format!("guest closes {at}"));
                self.shut(at, SHUT_BOTH);
            }
            _ => {}
        }
    }

    fn interrupt(&mut self, queue: usize, _: &Schedule) {
        match queue {
            RX => self.rx_due = true,
            TX => self.tx_due = true,
            _ => {}
        }
    }

    fn host(&mut self, with: &Schedule) {
        if self.talks.is_empty() || self.count < MOST && with.pick(8) == 0 {
            with.tell(|| "host connects".into());
            return self.connect_in(with);
        }
        let at = with.pick(self.talks.len());
        let talk = &mut self.talks[at];
        match with.pick(16) {
            0..=6 => {
                // Full buffers too, behind which the device looks for more.
                let full = u64::from(self.buffer) - HEADER_BYTES as u64;
                let count = with.one(&[1, 300, 20_000, 400_000, full, full, 4 * full]);
                with.tell(|| format!("host writes {count} to {at}"));
                talk.host_writes = talk.host_writes.max(count);
                talk.host_writes();
            }
            7..=13 => {
                let count = with.one(&[1, 1000, 20_000, PACKET as usize]);
                with.tell(|| format!("host reads {count} from {at}"));
                talk.host_reads(count, with);
            }
            14 if with.pick(3) == 0 && talk.greeting.ends_with(b"\n") => {
                with.tell(|| format!("host ends {at}"));
                if let Some(socket) = &talk.socket {
                    talk.host_ended = true;
                    socket.shutdown(Shutdown::Write).unwrap();
                }
            }
            15 if with.pick(6) == 0 && talk.greeting.ends_with(b"\n") => {
                with.tell(|| format!("host closes {at}"));
                talk.host_ended |= talk.socket.take().is_some();
            }
            _ => {}
        }
    }

    fn answer(&mut self, with: &Schedule) -> bool {
        let mut busy = self.rx_due || self.tx_due;
        if self.rx_due {
            self.rx_work(with);
        }
        if self.tx_due {
            self.tx_work();
        }
        for at in 0..self.talks.len() {
            busy |= self.read(at, usize::MAX, with);
            busy |= self.write(at);
            busy |= self.talks[at].host_reads(usize::MAX, with);
            busy |= self.talks[at].host_writes();
        }
        busy
    }

    fn left(&mut self) -> Option<String> {
        if self.rings[TX].unused() != 0 {
            return Some("packets of the guest are not taken".into());
        }
        if !self.waiting.is_empty() {
            return Some("packets of the guest wait for room".into());
        }
        let mut all = self.talks.iter();
        all.find_map(|talk| talk.left().map(|what| format!("{what}, on {}", talk.id)))
    }

    fn end(&mut self, _: &Schedule) {
        self.talks.clear();
    }
}

fn wired(with: &Schedule) -> Wired {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let id = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(format!("cvmm-served-{}-{}", id.0, id.1));
    let (mem, _) = memory();
    let lines = Arc::new(Lines::default());
    let (rx, tx) = (with.one(&[4, 8, 16, 256]), with.one(&[2, 4, 16, 256]));
    let slot = if tx > 16 { 1024 } else { SLOT };
    let rings = vec![
        Ring::new(&mem, &lines, 0, 0x10_0000, rx, 8 << 10),
        Ring::new(&mem, &lines, 1, 0x80_0000, tx, slot),
        Ring::new(&mem, &lines, 2, 0x78_0000, 4, 64),
    ];
    let window = with.one(&[WINDOW, 1 << 10, 1 << 10, 8 << 10]);
    let guest = Guest {
        rings,
        path: path.clone(),
        talks: vec![],
        count: 0,
        waiting: VecDeque::new(),
        rx_due: false,
        tx_due: false,
        buffer: 0,
        room: 0,
        packet: 0,
        strayed: false,
        half: window / 2,
        patience: 1,
    };
    let mut vsock = Vsock::open(CID, &path).unwrap();
    Arc::get_mut(&mut vsock.host).unwrap().window = window;
    Wired {
        device: Box::new(vsock),
        outside: Box::new(guest),
        mem,
        lines,
        features: F_STREAM,
        console: None,
        rest: REST,
    }
}

#[test]
fn no_stream_is_forgotten() {
    search("vsock", 200, &wired);
}
