//! What is planned is what is loaded, byte for byte: of every fixture, in the codes that it is stored in, on meshes that
//! cut through them.

#![allow(clippy::unwrap_used)] // all of this file is a test

use conclave_tests::planned::check;
use conclave_tests::ring::{fixture, fixtures};

#[test]
fn every_fixture_takes_what_was_planned() {
    for name in fixtures() {
        check(&fixture(&name), 0, &[(1, 1, 1, 1), (2, 1, 2, 2), (2, 1, 2, 1), (1, 2, 2, 4), (1, 2, 1, 1)]).unwrap();
    }
}
