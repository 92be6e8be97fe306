//! Credit of one connection (virtio 1.2, "Socket Device", "Buffer Space Management"). All counters wrap.

/// Counts bytes in both directions, so that neither side sends what the other has no room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flow {
    /// Our buffer, in bytes.
    window: u32,
    received: u32,
    forwarded: u32,
    /// `forwarded` as the guest last heard it.
    announced: u32,
    sent: u32,
    guest_window: u32,
    guest_forwarded: u32,
}

impl Flow {
    pub(super) fn new(window: u32) -> Self {
        Self {
            window,
            received: 0,
            forwarded: 0,
            announced: 0,
            sent: 0,
            guest_window: 0,
            guest_forwarded: 0,
        }
    }

    /// Takes over what a packet of the guest says about its buffer.
    pub(super) fn heard(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.guest_window = buf_alloc;
        self.guest_forwarded = fwd_cnt;
    }

    /// Bytes that may be sent to the guest now. A guest that claims more forwarded bytes than were sent, or
    /// shrinks its buffer below what is under way, gets none.
    pub(super) fn room(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_window.saturating_sub(under_way)
    }

    /// Bytes went to the guest.
    pub(super) fn sent(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// Bytes of ours that are in use.
    fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Counts bytes from the guest; false if it had no credit for them.
    pub(super) fn receive(&mut self, bytes: u32) -> bool {
        let fits = bytes <= self.window.saturating_sub(self.held());
        if fits {
            self.received = self.received.wrapping_add(bytes);
        }
        fits
    }

    /// Bytes from the guest reached their destination.
    pub(super) fn forward(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes.min(self.held()));
    }

    /// True if the guest thinks that more than half of our buffer is in use and is wrong.
    pub(super) fn is_news(&self) -> bool {
        let believed = self.received.wrapping_sub(self.announced);
        self.announced != self.forwarded && believed > self.window / 2
    }

    /// `buf_alloc` and `fwd_cnt` for a packet to the guest.
    pub(super) fn announce(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        (self.window, self.forwarded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lies_about_credit_never_give_more_room_than_the_window() {
        // Sent, window, forwarded, room.
        let cases = [
            (0, 1000, 0, 1000),
            (400, 1000, 0, 600),
            (400, 1000, 400, 1000),
            (400, 300, 0, 0),
            (400, 1000, 401, 0),
            (0, 1000, u32::MAX, 999),
            (400, 0, 400, 0),
        ];
        for (sent, window, forwarded, room) in cases {
            let mut flow = Flow::new(1);
            flow.sent(sent);
            flow.heard(window, forwarded);
            assert_eq!(flow.room(), room, "{sent} {window} {forwarded}");
        }
    }

    #[test]
    fn more_than_the_window_is_refused_and_changes_nothing() {
        let mut flow = Flow::new(100);
        assert!(flow.receive(60) && !flow.receive(41) && flow.receive(40) && !flow.receive(1));
        flow.forward(1000);
        assert_eq!(flow.announce(), (100, 100));
        assert!(flow.receive(100));
    }

    proptest::proptest! {
        #[test]
        fn two_sides_that_obey_never_overrun_each_other(
            start in proptest::num::u32::ANY,
            window in 1_u32..5000,
            steps in proptest::collection::vec((0_u8..3, 1_u32..3000), 1..200),
        ) {
            // Two of them, one per end of a connection; counters start anywhere, so they wrap.
            let begin = |mut flow: Flow| {
                (flow.received, flow.forwarded, flow.announced) = (start, start, start);
                (flow.sent, flow.guest_forwarded) = (start, start);
                flow
            };
            let (mut sender, mut receiver) = (begin(Flow::new(0)), begin(Flow::new(window)));
            sender.heard(window, start);
            let (mut held, mut total) = (0_u32, 0_u64);
            for (step, bytes) in steps {
                match step {
                    0 => {
                        let bytes = bytes.min(sender.room());
                        sender.sent(bytes);
                        proptest::prop_assert!(receiver.receive(bytes));
                        held += bytes;
                        total += u64::from(bytes);
                        proptest::prop_assert!(held <= window);
                    }
                    1 => {
                        let bytes = bytes.min(held);
                        receiver.forward(bytes);
                        held -= bytes;
                    }
                    _ => {
                        let (window, forwarded) = receiver.announce();
                        sender.heard(window, forwarded);
                        proptest::prop_assert_eq!(sender.room(), window - held);
                        proptest::prop_assert!(!receiver.is_news());
                    }
                }
            }
            // Never stuck: when all is forwarded, either there is room or there is news for the sender.
            receiver.forward(held);
            proptest::prop_assert!(total == 0 || sender.room() > 0 || receiver.is_news());
        }
    }
}
