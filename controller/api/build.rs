//! Generates the API's types from `proto/`, without `protoc`: `protox` compiles the files.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(["controller.proto"], ["proto"])?;
    tonic_prost_build::configure().btree_map(".").bytes(".").codec_path("crate::Codec").compile_fds(files)?;
    Ok(())
}
