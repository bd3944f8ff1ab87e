//! The wire: generated code and its conversions to the words of `model`.

#![forbid(unsafe_code)]

pub mod cluster {
    pub mod v1 {
        tonic::include_proto!("conclave.cluster.v1");
    }
}
