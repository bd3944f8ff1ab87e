//! Compiles the `.proto` files with protox: no `protoc` binary is needed.

const CLUSTER: &str = "proto/conclave/cluster/v1/cluster.proto";
const PEER: &str = "proto/conclave/cluster/v1/peer.proto";
const ETCD: &str = "proto/etcd/v3/etcd.proto";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for file in [CLUSTER, PEER, ETCD] {
        println!("cargo::rerun-if-changed={file}");
    }
    tonic_prost_build::configure().compile_fds(protox::compile([CLUSTER, PEER], ["proto"])?)?;
    tonic_prost_build::configure().build_server(false).compile_fds(protox::compile([ETCD], ["proto"])?)?;
    Ok(())
}
