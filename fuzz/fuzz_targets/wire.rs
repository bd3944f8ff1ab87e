//! Messages of the wire, from bytes, and their conversions. What was converted once survives the way there and back.

#![no_main]

use libfuzzer_sys::fuzz_target;
use model::plan::Epoch;
use prost::Message;
use proto::cluster::v1 as wire;
use proto::{convert, fault, step};

fuzz_target!(|input: &[u8]| {
    let Some((&kind, bytes)) = input.split_first() else { return };
    match kind % 6 {
        0 => {
            let Ok(plan) = wire::Plan::decode(bytes) else { return };
            if let Ok(plan) = convert::plan_from_wire(plan) {
                assert_eq!(convert::plan_from_wire(convert::plan_to_wire(&plan)).as_ref(), Ok(&plan));
            }
        }
        1 => {
            let Ok(order) = wire::StepOrder::decode(bytes) else { return };
            for lane in order.lanes {
                let (number, batch) = step::lane_from_wire(lane);
                let again = step::lane_from_wire(step::lane_to_wire(number, &batch));
                // Not-a-number is not equal to itself.
                assert_eq!(format!("{again:?}"), format!("{:?}", (number, batch)));
            }
        }
        2 => {
            let Ok(answer) = wire::StepAnswer::decode(bytes) else { return };
            for lane in answer.lanes {
                let (number, result) = step::result_from_wire(lane);
                let again = step::result_from_wire(step::result_to_wire(number, result.clone()));
                assert_eq!(format!("{again:?}"), format!("{:?}", (number, result)));
            }
        }
        3 => {
            let Ok(told) = wire::Fault::decode(bytes) else { return };
            let fault = fault::from_wire(told);
            assert_eq!(fault::from_wire(fault::to_wire(&fault, Epoch(1))).kind, fault.kind);
        }
        4 => drop(wire::WorkerMessage::decode(bytes)),
        _ => drop(wire::Command::decode(bytes)),
    }
});
