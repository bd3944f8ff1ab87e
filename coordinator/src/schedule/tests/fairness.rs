//! Tenants that share a group.

use super::*;

const LIMITS: Limits = Limits { model_len_max: 256, step_tokens_max: 64, step_sequences_max: 4, blocks: 64 };

fn crowded() -> Bench {
    Bench::new(Settings { jobs_waiting_max: 4000, ..Settings::new(LIMITS, 1) })
}

fn of(tenant: u64, first: u32, (prompt, answer): (u32, u32)) -> Job {
    Job { turn: Turn { tenant, ..Turn::default() }, ..job(first, prompt, answer) }
}

#[test]
fn a_flood_of_one_tenant_does_not_hold_up_anothers_first_job() {
    let mut bench = crowded();
    for number in 0..1000 {
        bench.add(of(1, number, (60, 20)));
    }
    (0..50).for_each(|_| {
        bench.step(8);
    });
    let late = bench.add(of(2, 5000, (60, 20)));
    let mut steps = 0;
    loop {
        let (step, batch) = bench.next().unwrap();
        let told = bench.answer(step, &batch, 8);
        if told.iter().any(|delivery| delivery.job == late) {
            break;
        }
        steps += 1;
        assert!(steps < 30, "those that run have at most twenty tokens left, those that wait are a thousand");
    }
    assert_eq!(bench.scheduler.load().tenants, 2);
}

#[test]
fn tenants_that_ask_without_end_are_served_alike_whatever_they_ask() {
    let mut bench = crowded();
    // Long prompts with short answers, and the other way round.
    let costs = [(1, (200, 4)), (2, (8, 40)), (3, (64, 64))];
    for number in 0..300 {
        costs.iter().for_each(|(tenant, cost)| {
            bench.add(of(*tenant, 1 + number, *cost));
        });
    }
    // What four sequences may still cost when they are admitted, twice.
    let bound = 2 * 4 * (64 + 2 * 64);
    for _ in 0..3000 {
        bench.step(8);
        let served = costs.map(|(tenant, _)| bench.scheduler.queue.served(tenant));
        let (least, most) = (served.iter().min().unwrap(), served.iter().max().unwrap());
        assert!(most - least <= bound, "{served:?}");
    }
    let served = costs.map(|(tenant, _)| bench.scheduler.queue.served(tenant));
    assert!(served.iter().all(|served| *served > 4 * bound), "{served:?}: too little to tell");
}

#[test]
fn many_choices_of_one_tenant_pass_nobody_elses_job() {
    let mut bench = crowded();
    for number in 0..20 {
        bench.add(Job { choices: 64, ..of(1, number, (60, 20)) });
    }
    bench.step(8);
    let late = bench.add(of(2, 5000, (60, 20)));
    let waited = (0..).find(|_| {
        let (step, batch) = bench.next().unwrap();
        bench.answer(step, &batch, 8).iter().any(|delivery| delivery.job == late)
    });
    assert!(waited.unwrap() < 30, "{waited:?} steps: those that run have at most twenty tokens left");
}

#[test]
fn a_key_of_more_weight_is_served_so_many_times_as_much() {
    let mut bench = crowded();
    for number in 0..600 {
        for (tenant, weight) in [(1, 1), (2, 3)] {
            bench.add(Job { turn: Turn { tenant, weight, priority: 0 }, ..job(tenant as u32 * 1000 + number, 40, 20) });
        }
    }
    // What four sequences may still cost when they are admitted.
    let bound = 4 * (40 + 2 * 20);
    for _ in 0..1500 {
        bench.step(8);
        let [light, heavy] = [1, 2].map(|tenant| bench.scheduler.queue.served(tenant));
        assert!(light.abs_diff(heavy) <= bound, "{light} and {heavy}, each by its weight");
    }
    assert!(bench.scheduler.queue.served(1) > 4 * bound, "too little to tell");
}

#[test]
fn a_stream_of_urgent_jobs_does_not_starve_their_own_keys_others() {
    let mut bench = crowded();
    let patient = bench.add(of(1, 9000, (60, 4)));
    let mut came = 0;
    loop {
        while bench.scheduler.load().jobs_waiting < 50 {
            came += 1;
            let turn = Turn { tenant: 1, priority: -1, weight: 1 };
            bench.add(Job { turn, ..job(came % 4000, 60, 4) });
        }
        let (step, batch) = bench.next().unwrap();
        if bench.answer(step, &batch, 8).iter().any(|delivery| delivery.job == patient) {
            break;
        }
        assert!(came < 1200, "a step of priority is worth 1,024 places");
    }
}

#[test]
fn what_the_cache_holds_and_what_is_computed_again_is_not_charged() {
    let mut bench = crowded();
    bench.add(of(1, 1, (64, 40)));
    bench.step(8);
    assert_eq!(bench.scheduler.queue.served(1), 64 + 2);
    bench.add(of(1, 1, (64, 40)));
    bench.step(8);
    assert_eq!(bench.scheduler.queue.served(1), 66 + 32 + 2 * 2, "the last block's tokens, and two that were drawn");
    bench.scheduler.requeue_all(*bench.scheduler.settings());
    let (served, drawn) = (bench.scheduler.queue.served(1), bench.scheduler.load().tokens_generated);
    (0..5).for_each(|_| {
        bench.step(8);
    });
    let drawn = bench.scheduler.load().tokens_generated - drawn;
    assert!(drawn >= 4, "{drawn} tokens of two answers");
    assert_eq!(bench.scheduler.queue.served(1), served + 2 * drawn);
}
