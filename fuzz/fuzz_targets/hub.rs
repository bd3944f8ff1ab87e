//! What a hub answers, and how its models are named. Nothing it says may lead out of the cache.

#![no_main]

use coordinator::hub::client::Listing;
use coordinator::hub::reference::Reference;
use coordinator::hub::{Need, select};
use libfuzzer_sys::fuzz_target;

fn stays_inside(name: &str) -> bool {
    !name.starts_with('/') && name.split('/').all(|step| !matches!(step, "" | "." | ".."))
}

fuzz_target!(|input: &[u8]| {
    let Some((name, listing)) = conclave_fuzz::two_texts(input) else { return };
    let reference = Reference::parse(name);
    if let Some(reference) = &reference {
        assert_eq!(Reference::parse(&reference.to_string()).as_ref(), Some(reference));
        assert!(stays_inside(&reference.revision) && reference.file.as_deref().is_none_or(stays_inside));
    }
    let Ok(listing) = Listing::parse(listing.unwrap_or(name)) else { return };
    assert!(listing.files.iter().all(|name| stays_inside(name)));
    let main = Reference { repository: "a/b".into(), revision: "main".into(), file: None };
    let reference = reference.unwrap_or(main);
    for need in [Need::Describe, Need::Serve] {
        if let Ok(files) = select::first(&listing.files, &reference, need) {
            assert!(files.iter().all(|file| listing.files.contains(file)));
        }
    }
});
