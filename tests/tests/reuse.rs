//! Matrices that stay from one epoch to the next: not read again, and the same bits.

#![allow(clippy::unwrap_used)] // all of this file is a test

use conclave_tests::requests::{self, Request, same};
use conclave_tests::ring::{Ring, Setting, fixture};
use model::mesh::Mesh;
use model::quant::Dtype;
use std::sync::Arc;

fn setting((pipeline, data, tensor, expert): (usize, usize, usize, usize)) -> Setting {
    Setting::new(Mesh::new(pipeline, data, tensor, expert).unwrap(), Dtype::Bf16)
}

/// Runs one request on mesh after mesh with the same shelves: bytes read for each, less in all than `fresh` ones read.
fn read(name: &str, meshes: &[(usize, usize, usize, usize)]) -> Vec<u64> {
    let path = fixture(name);
    let expected = requests::reference(&path, setting((1, 1, 1, 1)), &Request::new(1, 45)).unwrap();
    let shelves = Arc::new(worker::engine::shard::Shelves::default());
    let one = |mesh| {
        let mut ring = Ring::load_from(&path, setting(mesh), Some(shelves.clone())).unwrap();
        let found = requests::run(&mut ring, mesh.1, &[Request::new(1, 45)], 7).unwrap().remove(0);
        same(&format!("{name} {mesh:?}"), &found, &expected).unwrap();
        ring.bytes_read()
    };
    meshes.iter().map(|mesh| one(*mesh)).collect()
}

#[test]
fn a_mesh_loaded_again_reads_only_its_vectors() {
    for name in ["deepseek_v3", "deepseek_v3_fp8", "gpt_oss", "qwen3_moe"] {
        for mesh in [(1, 1, 2, 1), (1, 1, 2, 2), (2, 1, 1, 1)] {
            let bytes = read(name, &[mesh, mesh]);
            assert!(bytes[1] * 5 < bytes[0], "{name} {mesh:?}: {bytes:?}");
        }
    }
}

#[test]
fn stages_and_whole_experts_are_moved_without_being_read() {
    let bytes = read("qwen3_moe", &[(1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 1, 1), (1, 2, 1, 2), (1, 2, 1, 1)]);
    assert!(bytes[1..].iter().all(|&later| later * 3 < bytes[0]), "{bytes:?}");
    // Lanes share what both hold.
    let (one, two) = (read("qwen3_moe", &[(1, 1, 1, 1)])[0], read("qwen3_moe", &[(1, 2, 1, 1)])[0]);
    assert!(two * 2 < one * 3, "{two} for two lanes, {one} for one");
}

#[test]
fn another_cut_is_read_again() {
    let bytes = read("qwen3_moe", &[(1, 1, 2, 1), (1, 1, 1, 1), (1, 1, 2, 1)]);
    assert!(bytes[1] * 2 > bytes[0] && bytes[2] * 2 > bytes[0], "{bytes:?}");
}
