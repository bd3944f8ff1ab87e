//! The wire: generated code and its conversions to the words of `model`. Only this crate and the service files of
//! coordinator and worker know protobuf.

#![forbid(unsafe_code)]

pub mod address;
pub mod convert;
pub mod fault;
pub mod step;
pub mod tls;

/// The node plane's messages and service.
pub mod cluster {
    #[allow(clippy::all)]
    pub mod v1 {
        tonic::include_proto!("conclave.cluster.v1");
    }
}

/// The part of etcd's v3 API that the store speaks.
pub mod etcd {
    #[allow(clippy::all)]
    pub mod v3 {
        tonic::include_proto!("etcdserverpb");
    }
}

/// Raised with every change that an older peer would misread. Peers of another version are refused at the door.
pub const WIRE_VERSION: u32 = 3;

/// Largest message either side accepts: a step of many long prompts' chunks fits many times over.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// A message that breaks the protocol.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum WireError {
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("{what} = {value} is out of range")]
    Range { what: &'static str, value: u64 },
    #[error("{0}")]
    Mesh(#[from] model::SpecError),
}
