//! Congestion control that can be told to stand back.
//!
//! While pages are only pushed, the usual controller (Cubic) fills whatever queue the path has. That is right
//! for the rate, and wrong as soon as somebody waits for a single page, whose packets wait in the same queue.
//! Told to be polite, the bulk keeps the delay that it causes itself, the smoothed round trip beyond the
//! shortest one seen, at a target. The window that would just do so follows from what is in flight now: it is
//! as much smaller or larger as the round trip is longer or shorter than it should be. The usual controller
//! goes on beside it and stays an upper bound, so that loss is answered as ever.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, CubicConfig};
use quinn_proto::RttEstimator;

/// Delay that a polite sender may cause on a short path.
const TARGET: Duration = Duration::from_micros(500);
/// On a long path the round trip varies by itself: there it is this part of the path's own delay.
const TARGET_PART: u32 = 8;
/// Least bytes in flight: less would not fill one send to the kernel.
const LEAST_WINDOW_BYTES: u64 = 16 << 10;
/// And least packets: every second one is acknowledged at once, a single one only after 25 ms.
const LEAST_WINDOW_PACKETS: u64 = 4;
/// Bytes that QUIC may hold beyond what is in flight, so that it has something to send at each moment.
const AHEAD_BYTES: u64 = 64 << 10;

/// Whether a connection is polite: shared by who decides it and the connection's controller.
#[derive(Debug, Default)]
pub(super) struct Politeness {
    on: AtomicBool,
    /// The window while polite; 0 before the first acknowledgement.
    window: AtomicU64,
}

impl Politeness {
    pub(super) fn set(&self, on: bool) {
        self.on.store(on, Ordering::Relaxed);
    }

    fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// While polite: how much QUIC may take, in flight or not.
    pub(super) fn send_window(&self) -> Option<u64> {
        let window = self.window.load(Ordering::Relaxed);
        (self.is_on() && window > 0).then(|| window.saturating_add((window / 2).max(AHEAD_BYTES)))
    }
}

/// Makes the controllers of a connection.
pub(super) fn factory(
    initial_window: u64,
    politeness: &Arc<Politeness>,
) -> Arc<dyn ControllerFactory + Send + Sync> {
    let mut cubic = CubicConfig::default();
    cubic.initial_window(initial_window);
    Arc::new(Factory { cubic: Arc::new(cubic), politeness: politeness.clone() })
}

struct Factory {
    cubic: Arc<CubicConfig>,
    politeness: Arc<Politeness>,
}

impl ControllerFactory for Factory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Polite {
            usual: self.cubic.clone().build(now, current_mtu),
            politeness: self.politeness.clone(),
            window: None,
            next: now,
            mtu: current_mtu.into(),
            base: Duration::ZERO,
            round_trip: Duration::ZERO,
        })
    }
}

struct Polite {
    usual: Box<dyn Controller>,
    politeness: Arc<Politeness>,
    /// Our own window, while polite.
    window: Option<u64>,
    /// When it may change again: the last change has shown by then.
    next: Instant,
    mtu: u64,
    /// The shortest round trip seen.
    base: Duration,
    /// The smoothed one.
    round_trip: Duration,
}

impl Polite {
    fn adapt(&mut self, now: Instant, in_flight: u64, app_limited: bool) {
        // It begins with what is in flight: the usual window may never have been filled.
        let window = self.window.unwrap_or(in_flight);
        if self.window.is_some() && now < self.next {
            return;
        }
        let target = self.base + TARGET.max(self.base / TARGET_PART);
        let factor = target.as_secs_f64() / self.round_trip.as_secs_f64().max(1e-6);
        let factor = factor.clamp(0.5, if app_limited { 1.0 } else { 1.25 });
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a window in bytes, from a positive factor"
        )]
        let wanted = (window as f64 * factor) as u64;
        let least = LEAST_WINDOW_BYTES.max(LEAST_WINDOW_PACKETS * self.mtu).min(self.usual.window());
        self.window = Some(wanted.clamp(least, self.usual.window()));
        self.next = now + self.round_trip;
    }
}

impl Controller for Polite {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.usual.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        (self.base, self.round_trip) = (rtt.min(), rtt.get());
        // A window that is not used says nothing about the path and must not grow.
        let unused = self.window.is_some_and(|window| window < self.usual.window());
        self.usual.on_ack(now, sent, bytes, app_limited || unused, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest: Option<u64>) {
        self.usual.on_end_acks(now, in_flight, app_limited, largest);
        if self.politeness.is_on() {
            self.adapt(now, in_flight, app_limited);
        } else {
            self.window = None;
        }
        self.politeness.window.store(self.window.unwrap_or(0), Ordering::Relaxed);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent: bool, lost_bytes: u64) {
        self.usual.on_congestion_event(now, sent, is_persistent, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = new_mtu.into();
        self.usual.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        let usual = self.usual.window();
        self.window.map_or(usual, |window| window.min(usual))
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self { usual: self.usual.clone_box(), politeness: self.politeness.clone(), ..*self })
    }

    fn initial_window(&self) -> u64 {
        self.usual.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn polite(base: Duration) -> Polite {
        let politeness = Arc::new(Politeness::default());
        politeness.set(true);
        let mut cubic = CubicConfig::default();
        cubic.initial_window(100 << 20);
        let now = Instant::now();
        Polite {
            usual: Arc::new(cubic).build(now, 1500),
            politeness,
            window: None,
            next: now,
            mtu: 1500,
            base,
            round_trip: base,
        }
    }

    /// Runs it against a path that carries `rate` bytes per second, for so many round trips; the queue that
    /// is left.
    fn against(controller: &mut Polite, rate: f64, round_trips: u32) -> Duration {
        let mut now = Instant::now();
        let mut queue = 0.0_f64;
        for _ in 0..round_trips {
            let window = controller.window.unwrap_or(4 << 20) as f64;
            queue = (window - rate * controller.base.as_secs_f64()).max(0.0) / rate;
            controller.round_trip = controller.base + Duration::from_secs_f64(queue);
            now += controller.round_trip;
            controller.adapt(now, window as u64, false);
        }
        Duration::from_secs_f64(queue)
    }

    #[test]
    fn the_queue_comes_down_to_the_target_and_the_path_stays_full() {
        for (base, rate) in [(MS / 5, 125e6), (MS, 125e6), (MS / 10, 500e6), (50 * MS, 125e6)] {
            let target = TARGET.max(base / TARGET_PART);
            let queue = against(&mut polite(base), rate, 60);
            assert!(queue > Duration::ZERO, "{base:?} {rate}: the path is not full");
            assert!(queue < target * 3 / 2, "{base:?} {rate}: {queue:?}");
        }
    }

    #[test]
    fn a_window_that_is_not_used_does_not_grow_and_a_slow_path_keeps_a_least_one() {
        let mut controller = polite(MS);
        let now = Instant::now();
        controller.adapt(now, 1 << 20, true);
        assert_eq!(controller.window, Some(1 << 20));
        controller.adapt(now + MS, 1 << 20, false);
        assert_eq!(controller.window, Some(1_310_720), "used, and without a queue");
        controller.adapt(now + MS, 1 << 20, false);
        assert_eq!(controller.window, Some(1_310_720), "once in a round trip");
        against(&mut controller, 1e5, 60);
        assert_eq!(controller.window, Some(LEAST_WINDOW_BYTES));
        controller.on_mtu_update(9000);
        controller.next = now;
        against(&mut controller, 1e5, 60);
        assert_eq!(controller.window, Some(36_000), "jumbo frames: four of them");
    }

    #[test]
    fn the_usual_controller_is_an_upper_bound_and_has_the_word_again_afterwards() {
        let mut controller = polite(MS);
        let now = Instant::now();
        controller.on_end_acks(now, 1 << 20, true, None);
        assert_eq!(controller.window(), 1 << 20);
        assert_eq!(controller.politeness.send_window(), Some(3 << 19));
        controller.on_congestion_event(now, now, true, 1500);
        assert_eq!(controller.window(), controller.usual.window());
        assert!(controller.window() < 1 << 20);
        controller.politeness.set(false);
        controller.on_end_acks(now, 0, true, None);
        assert_eq!((controller.window, controller.politeness.send_window()), (None, None));
    }
}
