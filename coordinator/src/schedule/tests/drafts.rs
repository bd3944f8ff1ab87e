//! Chunks with drafts: what of them counts, and where an answer ends.

use super::*;
use model::step::SeqId;

/// A step's answer in which its only sequence drew `tokens`.
fn drew(batch: &StepBatch, tokens: &[u32]) -> StepResult {
    let seq = batch.lanes[0].chunks[0].seq;
    let samples = tokens.iter().map(|&token| Sample { seq, token, score: None }).collect();
    StepResult { lanes: vec![LaneResult { samples, ..LaneResult::default() }] }
}

#[test]
fn drafts_that_were_right_are_tokens_and_others_are_drawn_again() {
    let mut bench = Bench::new(Settings { drafts_max: 3, ..settings() });
    bench.add(Job { prompt: vec![1, 2, 3, 4, 5, 1, 2], ..job(1, 7, 9) });
    bench.step(3);
    let (step, batch) = bench.next().unwrap();
    let chunk = &batch.lanes[0].chunks[0];
    assert_eq!((chunk.start, &chunk.tokens[..], chunk.drafts), (7, &[3, 4, 5, 1][..], 3));
    for wrong in [&[][..], &[4], &[4, 5], &[6, 5], &[4, 5, 1], &[4, 5, 1, 2, 3]] {
        let fault = bench.scheduler.complete(bench.now, step, drew(&batch, wrong)).unwrap_err();
        assert!(fault.text.contains("not those that were asked"), "{wrong:?}");
    }
    let deliveries = bench.scheduler.complete(bench.now, step, drew(&batch, &[4, 5, 8])).unwrap();
    assert!(deliveries.into_iter().map(|delivery| delivery.output).eq([token(4), token(5), token(8)]));
    assert_eq!((bench.scheduler.load().tokens_drafted, bench.scheduler.load().drafts_accepted), (3, 2));
    let (batch, _) = bench.step(3);
    assert_eq!(shape(&batch.lanes[0]), [(10, 1, true)], "behind the two that were right");
    bench.scheduler.check_integrity().unwrap();
}

#[test]
fn an_answer_ends_among_the_draws_behind_drafts_or_at_its_length() {
    for (tokens_max, fourth, drawn, told, reason) in [
        (9, 99, &[4, 99, 1, 6][..], &[4, 99][..], DoneReason::End),
        // The last of an answer's tokens is no draft: a token is drawn behind each.
        (4, 5, &[4, 5, 8], &[4, 5, 8], DoneReason::Length),
        (3, 5, &[4, 8], &[4, 8], DoneReason::Length),
        (2, 5, &[8], &[8], DoneReason::Length),
    ] {
        let mut bench = Bench::new(Settings { drafts_max: 3, ..settings() });
        bench.add(Job { prompt: vec![1, 2, 3, 4, fourth, 1, 2], ..job(1, 7, tokens_max) });
        bench.step(3);
        let (step, batch) = bench.next().unwrap();
        assert_eq!(batch.lanes[0].chunks[0].drafts as usize, drawn.len() - 1);
        let outputs = bench.scheduler.complete(bench.now, step, drew(&batch, drawn)).unwrap();
        let expected = told.iter().copied().map(token).chain([done(0, reason)]);
        assert!(outputs.into_iter().map(|delivery| delivery.output).eq(expected));
        assert_eq!(
            bench.scheduler.load().drafts_accepted as usize,
            told.len() - 1,
            "what comes behind an end is no token"
        );
        bench.scheduler.check_integrity().unwrap();
        assert!(bench.next().is_none() && bench.scheduler.is_idle());
    }
}

#[test]
fn drafts_go_on_into_a_block_that_is_free() {
    for (blocks, drafts, sent) in [(2, 3, 1), (1, 1, 0)] {
        let limits = Limits { blocks, ..settings().limits };
        let mut bench = Bench::new(Settings { limits, drafts_max: 3, predicts: true, ..settings() });
        // The answer's end would not fit into one block, were it not short.
        let tokens_max = if blocks == 1 { 3 } else { 20 };
        bench.add(Job { prompt: (0..30).collect(), ..job(1, 7, tokens_max) });
        let (step, batch) = bench.next().unwrap();
        let mut result = drew(&batch, &[40]);
        result.lanes[0].guesses = vec![Guesses { seq: batch.lanes[0].chunks[0].seq, tokens: vec![41, 42, 43] }];
        bench.scheduler.complete(bench.now, step, result).unwrap();
        let (_, next) = bench.next().unwrap();
        let chunk = &next.lanes[0].chunks[0];
        assert_eq!((chunk.drafts, chunk.blocks.len()), (drafts, sent), "{blocks} blocks");
        bench.scheduler.check_integrity().unwrap();
    }
}

#[test]
fn what_the_group_guesses_is_the_next_chunks_draft() {
    let predicts = Settings { drafts_max: 3, predicts: true, ..settings() };
    let mut bench = Bench::new(predicts);
    bench.add(Job { prompt: vec![1, 2, 3, 4, 5, 1, 2], ..job(1, 7, 20) });
    let (step, batch) = bench.next().unwrap();
    assert_eq!(batch.lanes[0].guesses, 3);
    let seq = batch.lanes[0].chunks[0].seq;
    let answer = |drawn: &[u32], guesses: Vec<Guesses>| {
        let mut result = drew(&batch, drawn);
        result.lanes[0].guesses = guesses;
        result
    };
    let guess = |tokens: &[u32]| vec![Guesses { seq, tokens: tokens.to_vec() }];
    let stranger = vec![Guesses { seq: SeqId(77), tokens: vec![1] }];
    for wrong in [guess(&[1, 2, 3, 4]), stranger, [guess(&[1]), guess(&[2])].concat()] {
        let fault = bench.scheduler.complete(bench.now, step, answer(&[3], wrong)).unwrap_err();
        assert!(fault.text.contains("guesses that nobody asked for, 3 were"), "{}", fault.text);
    }
    bench.scheduler.complete(bench.now, step, answer(&[3], guess(&[8, 9]))).unwrap();
    let (step, next) = bench.next().unwrap();
    assert_eq!((&next.lanes[0].chunks[0].tokens[..], next.lanes[0].guesses), (&[3, 8, 9][..], 3));
    bench.scheduler.complete(bench.now, step, answer(&[8, 7], guess(&[6, 6, 6]))).unwrap();
    // One of two was right: two are tried.
    let (step, next) = bench.next().unwrap();
    assert_eq!((&next.lanes[0].chunks[0].tokens[..], next.lanes[0].guesses), (&[7, 6, 6][..], 2));
    bench.scheduler.complete(bench.now, step, answer(&[2], guess(&[3, 4]))).unwrap();
    let (step, next) = bench.next().unwrap();
    assert_eq!(&next.lanes[0].chunks[0].tokens[..], [2, 3], "none was right: one is tried");
    // Where the group guesses what was there before, that goes on for longer.
    bench.scheduler.complete(bench.now, step, answer(&[3, 1], vec![])).unwrap();
    let (step, next) = bench.next().unwrap();
    assert_eq!(next.lanes[0].chunks[0].drafts, 0, "nothing is known behind 2, 3, 1");
    bench.scheduler.complete(bench.now, step, answer(&[2], vec![])).unwrap();
    let (step, next) = bench.next().unwrap();
    assert_eq!(next.lanes[0].chunks[0].drafts, 0);
    bench.scheduler.complete(bench.now, step, answer(&[3], guess(&[8]))).unwrap();
    let (_, next) = bench.next().unwrap();
    assert_eq!(&next.lanes[0].chunks[0].tokens[..], [3, 8, 7]);
}
