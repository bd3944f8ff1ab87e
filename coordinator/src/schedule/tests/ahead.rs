//! Steps that are issued before the one before is answered.

use super::*;

fn ahead() -> Settings {
    Settings { steps_ahead: 1, ..settings() }
}

#[test]
fn a_decode_goes_on_from_a_token_that_is_not_known_yet() {
    let mut bench = Bench::new(ahead());
    bench.add(job(1, 5, 4));
    let (prompt, first) = bench.next().unwrap();
    let (step, second) = bench.next().unwrap();
    assert!(bench.next().is_none(), "one step ahead is enough");
    let chunk = &second.lanes[0].chunks[0];
    assert_eq!((chunk.start, chunk.is_fed(), chunk.sample, chunk.rows()), (5, true, true, 1));
    let outputs = bench.answer(prompt, &first, 8);
    assert_eq!(outputs.last().unwrap().output, token(8));
    let (third_step, third) = bench.next().unwrap();
    assert_eq!((third.lanes[0].chunks[0].start, third.lanes[0].chunks[0].is_fed()), (6, true));
    bench.answer(step, &second, 9);
    let (fourth_step, fourth) = bench.next().unwrap();
    bench.answer(third_step, &third, 9);
    assert!(bench.next().is_none(), "the fourth token is the last");
    let outputs = bench.answer(fourth_step, &fourth, 9);
    assert_eq!(outputs.last().unwrap().output, done(0, DoneReason::Length));
    assert!(bench.scheduler.is_idle());
}

#[test]
fn what_was_computed_behind_an_end_counts_for_nothing() {
    let mut bench = Bench::new(ahead());
    let id = bench.add(job(1, 5, 40));
    let (prompt, first) = bench.next().unwrap();
    let (step, second) = bench.next().unwrap();
    let outputs = bench.answer(prompt, &first, 99);
    let last = outputs.last().unwrap();
    assert!((last.job, last.last) == (id, true) && last.output == done(0, DoneReason::End));
    assert!(bench.scheduler.load().blocks_used > 0, "a step in flight still writes there");
    assert!(bench.next().is_none());
    assert_eq!(bench.answer(step, &second, 7), []);
    assert_eq!((bench.scheduler.load().blocks_used, bench.scheduler.load().tokens_generated), (0, 1));
    assert!(bench.scheduler.is_idle());
}

#[test]
fn nobody_is_preempted_for_a_token_that_may_never_be() {
    let limits = Limits { blocks: 3, ..ahead().limits };
    let mut bench = Bench::new(Settings { limits, prefix_cache: false, ..ahead() });
    bench.add(job(1, BLOCK_TOKENS as u32 - 1, 8));
    bench.add(job(2, BLOCK_TOKENS as u32 - 1, 8));
    let (step, first) = bench.next().unwrap();
    // The last place of each block.
    let (second_step, second) = bench.next().unwrap();
    assert_eq!(shape(&second.lanes[0]), [(31, 0, true), (31, 0, true)]);
    bench.answer(step, &first, 8);
    let (third_step, third) = bench.next().unwrap();
    assert_eq!(shape(&third.lanes[0]), [(32, 0, true)], "one block is left");
    assert_eq!(bench.scheduler.load().preemptions, 0);
    bench.answer(second_step, &second, 8);
    assert_eq!(shape(&bench.next().unwrap().1.lanes[0]), [(33, 0, true)]);
    assert_eq!(bench.scheduler.load().preemptions, 1, "its token is known and finds no room");
    bench.answer(third_step, &third, 8);
}
