//! A group's scheduler over one epoch after another. Between epochs jobs wait, or move to a group that serves.

use crate::cluster::driver::{GroupEnded, Turn};
use crate::schedule::Settings;
use crate::schedule::driver::{Driver, Ended};
use model::plan::Guesser;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// An epoch that ends only for the next one's sake is followed soon: jobs stay for so long.
const SOON: Duration = Duration::from_secs(2);

/// Runs until the shell, or everyone who could send jobs, is gone. `settings` are
/// the driver's, before any plan. `elsewhere`: whether another group serves.
pub async fn run(
    mut driver: Driver,
    mut turns: mpsc::Receiver<Turn>,
    ended: mpsc::Sender<GroupEnded>,
    mut elsewhere: watch::Receiver<bool>,
    mut settings: Settings,
) {
    let steps_ahead = settings.steps_ahead;
    let mut stay = Instant::now();
    loop {
        let now = Instant::now();
        if *elsewhere.borrow_and_update() && now >= stay {
            driver.requeue(settings);
            driver.move_all();
        }
        let turn = tokio::select! {
            turn = turns.recv() => turn,
            more = driver.hold() => if more { continue } else { return },
            changed = elsewhere.changed() => if changed.is_ok() { continue } else { return },
            () = tokio::time::sleep_until(stay), if now < stay => continue,
        };
        let (plan, mut group) = match turn {
            None => return,
            Some(Turn::Halt { .. }) => continue,
            Some(Turn::Serve { plan, group }) => (plan, group),
        };
        let steps_in_flight_max = plan.mesh.pipeline;
        // Between the last stage, which draws, and the first, which reads, tokens go through the scheduler.
        let steps_ahead = if steps_in_flight_max == 1 { steps_ahead } else { 0 };
        let (limits, lanes, predicts) = (plan.limits, plan.mesh.data, plan.guesser != Guesser::Nobody);
        settings = Settings { limits, lanes, steps_in_flight_max, steps_ahead, predicts, ..settings };
        driver.requeue(settings);
        let outcome = tokio::select! {
            outcome = driver.run(&mut group) => outcome,
            turn = turns.recv() => match turn {
                // Only a halt follows a serve.
                Some(Turn::Halt { died: true }) => {
                    driver.died();
                    continue;
                }
                Some(_) => {
                    stay = Instant::now() + SOON;
                    continue;
                }
                None => return,
            },
        };
        match outcome {
            Ended::Closed => return,
            Ended::Faulted(fault) => {
                driver.died();
                let _ = ended.send(GroupEnded { epoch: plan.epoch, fault }).await;
            }
        }
    }
}
