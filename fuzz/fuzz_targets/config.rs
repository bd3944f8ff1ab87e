//! A `config.json` (and, behind a NUL, a `generation_config.json`): the spec, then everything that is computed from it
//! before a weight is read: catalogue, sizes, schemes of codes, and a plan on three kinds of hosts.

#![no_main]

use coordinator::plan::{self, Device, Offer, Policy};
use libfuzzer_sys::fuzz_target;
use model::catalog;
use model::plan::{KernelFamily, WorkerId};
use model::quant::Format;
use model::spec::{Branch, ModelSpec};
use model::storage::Storage;

fn offers(hosts: usize, devices: usize, memory_bytes: u64) -> Vec<Offer> {
    let offer = |host: usize| Offer {
        worker: WorkerId(format!("w{host}")),
        host: format!("h{host}"),
        data_address: format!("10.0.0.{host}:1"),
        devices: vec![Device { memory_bytes, threads: 4 }; devices],
        families: vec![KernelFamily::Vector],
    };
    (0..hosts).map(offer).collect()
}

/// Declarations of all tensors; the catalogue lists each expert.
fn declared(spec: &ModelSpec) -> usize {
    let of = |branch: &Branch| if let Branch::Moe(moe) = branch { moe.experts } else { 1 };
    spec.layers.iter().map(|layer| 16 + layer.branches.iter().map(of).sum::<usize>()).sum()
}

fuzz_target!(|input: &[u8]| {
    let Some((config, generation)) = conclave_fuzz::two_texts(input) else { return };
    let Ok(spec) = model::hf::spec(config, generation) else { return };
    model::parameters::count(&spec);
    if declared(&spec) <= 4096 {
        for tensor in catalog::tensors(&spec) {
            catalog::tensor_name(&spec, &tensor.id);
            spec.scheme(&tensor.id, spec.hidden);
        }
    }
    for (hosts, devices, memory) in [(1, 1, 64 << 30), (2, 4, 80 << 30), (3, 2, 1 << 20)] {
        let _ = plan::plan(&spec, &Storage::stated(&spec, Format::Bf16), &offers(hosts, devices, memory), &Policy::default(), None);
    }
});
