//! Kernels on the CPU, each thread of a block a fiber.

#![allow(clippy::unwrap_used)] // all of this file is a test

use conclave_tests::gpp::Stack;
use std::path::Path;

/// Without a bug every schedule gives the sums of plain loops; each of the planted ones shows under at least one.
#[test]
fn schedules_find_every_planted_bug() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake-cuda");
    let Some(stack) = Stack::build(&folder, "the shim is").unwrap() else { return };
    let ran = stack.planted().output().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success(), "{said}{}", String::from_utf8_lossy(&ran.stderr));
    assert_eq!(said.lines().count(), 18, "{said}");
    assert!(said.starts_with("bug  0:  0 of 16 schedules\n"), "{said}");
}
