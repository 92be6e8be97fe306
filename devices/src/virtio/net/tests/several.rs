//! Cards of several pairs.

use super::*;

/// Rings of one pair are this far apart.
const APART: u64 = 0x2_0000;

/// A driver of a card with several streams, all of which it uses.
struct Several {
    net: Net,
    running: Box<dyn Running>,
    /// Receive and send of each pair, and control.
    rings: Vec<MockRing>,
    peers: Vec<UnixStream>,
}

impl Several {
    fn new(pairs: u16, receive: Rates) -> Self {
        let (mut links, mut peers): (Vec<Box<dyn Link>>, _) = (vec![], vec![]);
        for _ in 0..pairs {
            let (near, peer) = UnixStream::pair().unwrap();
            near.set_nonblocking(true).unwrap();
            links.push(Box::new(Stream::new(near)));
            peers.push(peer);
        }
        let net = Net::new(links, 0, None, mac()).unwrap();
        let mut net = net.limit(receive, Rates::default()).unwrap();
        let (mem, _) = memory();
        let rings: Vec<_> = (0..=u64::from(pairs) * 2)
            .map(|i| MockRing::new(&mem, 0x10_0000 + i * APART, 64))
            .collect();
        let (with, _) = activation(&mem, &rings.iter().collect::<Vec<_>>(), MQ | CTRL_VQ);
        let running = net.activate(with).unwrap();
        let mut card = Self {
            net,
            running,
            rings,
            peers,
        };
        card.use_pairs(pairs);
        card
    }

    fn use_pairs(&mut self, count: u16) {
        let control = self.rings.len() - 1;
        let [low, high] = count.to_le_bytes();
        let (_, at) = self.rings[control].send(&[&[4, 0, low, high]], &[1]);
        self.running.on_kick(control).unwrap();
        assert_eq!(self.rings[control].read(at[1], 1), [0]);
    }

    fn arrive(&mut self, pair: usize) {
        self.peers[pair].write_all(&[0, 0, 0, 2, 7, 7]).unwrap();
    }

    fn post(&mut self, pair: usize) {
        self.rings[pair * 2].send(&[], &[100]);
    }

    fn received(&mut self, pair: usize) -> usize {
        std::iter::from_fn(|| self.rings[pair * 2].take_used()).count()
    }

    /// Runs the backend until the device no longer asks for it.
    fn settle(&mut self) {
        while !self.net.poll.ready().is_empty() {
            self.running.on_backend().unwrap();
        }
    }
}

fn per_second(operations: u64) -> Rates {
    Rates {
        bytes: None,
        operations: Some(operations),
    }
}

#[test]
fn a_pair_that_had_no_buffers_when_it_was_left_receives_when_it_is_used_again() {
    let mut card = Several::new(2, Rates::default());
    card.arrive(1);
    card.settle();
    card.use_pairs(1);
    card.post(1);
    card.running.on_kick(2).unwrap();
    card.use_pairs(2);
    card.settle();
    assert_eq!(card.received(1), 1);
}

#[test]
fn the_end_of_a_wait_is_seen_among_many_ready_links() {
    let mut card = Several::new(40, per_second(50));
    for pair in 0..40 {
        card.post(pair);
    }
    for _ in 0..50 {
        card.post(39);
    }
    for _ in 0..51 {
        card.arrive(39);
    }
    while card.received(39) != 0 || card.net.poll.ready().iter().any(|(token, _)| token == 39) {
        card.running.on_backend().unwrap();
    }
    // These come before the end of the wait, and more than one look at the set shows.
    for pair in 0..33 {
        card.arrive(pair);
    }
    std::thread::sleep(Duration::from_secs(1));
    card.running.on_backend().unwrap();
    card.settle();
    assert_eq!(card.received(39), 1);
}

#[test]
fn pairs_share_a_rate_and_none_starves() {
    let mut card = Several::new(2, per_second(50));
    let began = std::time::Instant::now();
    let mut received = [0, 0];
    for pair in 0..2 {
        for _ in 0..64 {
            card.post(pair);
        }
        for _ in 0..64 {
            card.arrive(pair);
        }
    }
    // Behind the burst.
    while received.iter().sum::<usize>() < 100 {
        assert!(began.elapsed() < Duration::from_secs(20), "{received:?}");
        if card.net.poll.ready().is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        } else {
            card.running.on_backend().unwrap();
        }
        for (pair, sum) in received.iter_mut().enumerate() {
            let count = card.received(pair);
            *sum += count;
            for _ in 0..count {
                card.post(pair);
                card.arrive(pair);
            }
            card.running.on_kick(pair * 2).unwrap();
        }
    }
    assert!(received.iter().all(|count| *count >= 15), "{received:?}");
}
