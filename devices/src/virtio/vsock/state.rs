//! What one connection may do next: pure, without sockets and rings.

use super::flow::Flow;
use super::packet::{Header, SHUT_BOTH, SHUT_RECEIVE, SHUT_SEND, op};

/// What the owner of a connection has to do after a packet of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing beyond what the state knows.
    Go,
    /// The guest accepted what the host asked for.
    Established,
    /// The payload goes to the socket.
    Deliver,
    /// The guest closed one direction or another.
    HalfClosed,
    /// The guest closed both directions: confirm with a reset, send on what is held.
    Closed,
    /// The guest reset the connection: drop it.
    Gone,
    /// The guest broke the protocol: reset and drop.
    Violation,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest has our request.
    Requested,
    Open,
}

/// One connection.
#[derive(Debug)]
pub(super) struct State {
    phase: Phase,
    pub(super) flow: Flow,
    /// `SHUT_*` that the guest sent.
    guest_shut: u32,
    /// `SHUT_*` that the guest is or will be told.
    host_shut: u32,
    /// The opening packet still has to go out.
    owes_opening: bool,
    owes_shutdown: bool,
    owes_credit: bool,
    wants_credit: bool,
    asked_for_credit: bool,
}

impl State {
    /// A connection that the host asks for.
    pub(super) fn request(window: u32) -> Self {
        Self::new(Phase::Requested, window)
    }

    /// A connection that the guest asked for with `header`.
    pub(super) fn respond(window: u32, header: &Header) -> Self {
        let mut state = Self::new(Phase::Open, window);
        state.flow.heard(header.buf_alloc, header.fwd_cnt);
        state
    }

    fn new(phase: Phase, window: u32) -> Self {
        Self {
            phase,
            flow: Flow::new(window),
            guest_shut: 0,
            host_shut: 0,
            owes_opening: true,
            owes_shutdown: false,
            owes_credit: false,
            wants_credit: false,
            asked_for_credit: false,
        }
    }

    /// The guest has not answered our request.
    pub(super) fn is_requested(&self) -> bool {
        self.phase == Phase::Requested
    }

    /// The guest was told that both directions are closed; a reset has to follow.
    pub(super) fn awaits_reset(&self) -> bool {
        self.host_shut == SHUT_BOTH
    }

    /// The guest will send no more.
    pub(super) fn guest_done(&self) -> bool {
        self.guest_shut & SHUT_SEND != 0
    }

    /// The guest will receive no more.
    pub(super) fn guest_deaf(&self) -> bool {
        self.guest_shut & SHUT_RECEIVE != 0
    }

    /// Bytes from the socket are wanted.
    pub(super) fn takes_host_data(&self) -> bool {
        self.phase == Phase::Open && self.host_shut & SHUT_SEND == 0 && !self.guest_deaf()
    }

    /// Takes a packet of this connection.
    pub(super) fn on_packet(&mut self, header: &Header) -> Verdict {
        self.flow.heard(header.buf_alloc, header.fwd_cnt);
        if self.flow.room() > 0 {
            self.asked_for_credit = false;
        }
        match (self.phase, header.op) {
            (_, op::RST) => Verdict::Gone,
            (Phase::Requested, op::RESPONSE) if !self.owes_opening => {
                self.phase = Phase::Open;
                Verdict::Established
            }
            (Phase::Open, op::RW) if !self.guest_done() && self.flow.receive(header.len) => Verdict::Deliver,
            (Phase::Open, op::CREDIT_UPDATE) => Verdict::Go,
            (Phase::Open, op::CREDIT_REQUEST) => {
                self.owes_credit = true;
                Verdict::Go
            }
            (Phase::Open, op::SHUTDOWN) => {
                self.guest_shut |= header.flags & SHUT_BOTH;
                if self.guest_shut == SHUT_BOTH {
                    Verdict::Closed
                } else {
                    Verdict::HalfClosed
                }
            }
            _ => Verdict::Violation,
        }
    }

    /// The socket gives no more (`SHUT_SEND`) or takes no more (`SHUT_RECEIVE`).
    pub(super) fn host_shut(&mut self, flags: u32) {
        let all = self.host_shut | flags;
        self.owes_shutdown |= all != self.host_shut;
        self.host_shut = all;
    }

    /// The guest knows that there is data and no credit.
    pub(super) fn has_asked(&self) -> bool {
        self.asked_for_credit
    }

    /// There is data for the guest and no credit.
    pub(super) fn ask_for_credit(&mut self) {
        self.wants_credit |= !self.asked_for_credit;
        self.asked_for_credit = true;
    }

    /// True if [`next`](Self::next) has a packet.
    pub(super) fn owes(&self) -> bool {
        let opened = self.phase == Phase::Open;
        self.owes_opening
            || opened && (self.owes_shutdown || self.owes_credit || self.wants_credit || self.flow.is_news())
    }

    /// The next packet without payload that the guest is due: its operation and flags.
    pub(super) fn next(&mut self) -> Option<(u16, u32)> {
        let opened = self.phase == Phase::Open;
        if std::mem::take(&mut self.owes_opening) {
            return Some((if opened { op::RESPONSE } else { op::REQUEST }, 0));
        }
        if !opened {
            return None;
        }
        if std::mem::take(&mut self.owes_shutdown) {
            return Some((op::SHUTDOWN, self.host_shut));
        }
        if std::mem::take(&mut self.wants_credit) {
            return Some((op::CREDIT_REQUEST, 0));
        }
        (std::mem::take(&mut self.owes_credit) || self.flow.is_news()).then_some((op::CREDIT_UPDATE, 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(op: u16, len: u32, flags: u32) -> Header {
        Header {
            op,
            len,
            flags,
            buf_alloc: 1000,
            ..Header::default()
        }
    }

    fn open() -> State {
        let mut state = State::respond(100, &packet(op::REQUEST, 0, 0));
        assert_eq!(state.next(), Some((op::RESPONSE, 0)));
        state
    }

    #[test]
    fn a_request_is_answered_once_and_in_order() {
        let mut early = State::request(100);
        assert_eq!(early.on_packet(&packet(op::RESPONSE, 0, 0)), Verdict::Violation);
        for (answer, verdict) in [
            (op::RESPONSE, Verdict::Established),
            (op::RST, Verdict::Gone),
            (op::RW, Verdict::Violation),
            (op::REQUEST, Verdict::Violation),
            (op::SHUTDOWN, Verdict::Violation),
            (op::CREDIT_UPDATE, Verdict::Violation),
            (0, Verdict::Violation),
        ] {
            let mut state = State::request(100);
            assert!(state.owes() && !state.takes_host_data());
            assert_eq!(state.next(), Some((op::REQUEST, 0)));
            assert_eq!(state.next(), None);
            assert_eq!(state.on_packet(&packet(answer, 1, 0)), verdict, "{answer}");
        }
    }

    #[test]
    fn what_an_open_connection_may_receive() {
        for (op, len, verdict) in [
            (op::RW, 0, Verdict::Deliver),
            (op::RW, 100, Verdict::Deliver),
            (op::RW, 101, Verdict::Violation),
            (op::RW, u32::MAX, Verdict::Violation),
            (op::CREDIT_UPDATE, 0, Verdict::Go),
            (op::REQUEST, 0, Verdict::Violation),
            (op::RESPONSE, 0, Verdict::Violation),
            (op::RST, 0, Verdict::Gone),
            (99, 0, Verdict::Violation),
        ] {
            assert_eq!(open().on_packet(&packet(op, len, 0)), verdict, "{op} {len}");
        }
    }

    #[test]
    fn every_order_of_shutdowns_ends_closed() {
        for order in [
            &[SHUT_BOTH][..],
            &[SHUT_SEND, SHUT_RECEIVE],
            &[SHUT_RECEIVE, SHUT_SEND],
            &[0, SHUT_SEND, SHUT_BOTH],
        ] {
            let mut state = open();
            for (i, flags) in order.iter().enumerate() {
                let last = i + 1 == order.len();
                let verdict = if last {
                    Verdict::Closed
                } else {
                    Verdict::HalfClosed
                };
                assert_eq!(
                    state.on_packet(&packet(op::SHUTDOWN, 0, *flags)),
                    verdict,
                    "{order:?}"
                );
            }
            assert!(state.guest_done() && !state.takes_host_data());
        }
        let mut state = open();
        state.on_packet(&packet(op::SHUTDOWN, 0, SHUT_SEND));
        assert!(state.takes_host_data(), "the other direction lives on");
        assert_eq!(state.on_packet(&packet(op::RW, 1, 0)), Verdict::Violation);
    }

    #[test]
    fn the_guest_is_told_of_each_shutdown_once() {
        let mut state = open();
        state.host_shut(SHUT_SEND);
        assert!(!state.takes_host_data() && !state.awaits_reset());
        assert_eq!(state.next(), Some((op::SHUTDOWN, SHUT_SEND)));
        state.host_shut(SHUT_SEND);
        assert_eq!(state.next(), None);
        state.host_shut(SHUT_RECEIVE);
        assert_eq!(state.next(), Some((op::SHUTDOWN, SHUT_BOTH)));
        assert!(state.awaits_reset());
    }

    #[test]
    fn credit_is_asked_for_once_per_drought_and_given_when_it_is_news() {
        let mut state = open();
        state.ask_for_credit();
        state.ask_for_credit();
        assert_eq!(state.next(), Some((op::CREDIT_REQUEST, 0)));
        assert_eq!(state.next(), None);
        state.on_packet(&packet(op::CREDIT_UPDATE, 0, 0));
        state.ask_for_credit();
        assert_eq!(state.next(), Some((op::CREDIT_REQUEST, 0)));
        state.on_packet(&packet(op::RW, 60, 0));
        assert_eq!(state.next(), None, "nothing was forwarded");
        state.flow.forward(60);
        assert_eq!(state.next(), Some((op::CREDIT_UPDATE, 0)));
        state.flow.announce();
        assert!(!state.owes());
        state.on_packet(&packet(op::CREDIT_REQUEST, 0, 0));
        assert_eq!(state.next(), Some((op::CREDIT_UPDATE, 0)));
    }
}
