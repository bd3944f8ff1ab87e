//! Bytes of weights, cache and workspace a rank.
