//! Writes the CustomResourceDefinitions into `deploy/chart/definitions/`, from the types that the controller reads and writes.

use std::fs;
use std::io;
use std::path::Path;

use hermes_controller::crd::definitions;

fn main() -> io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/chart/definitions");
    fs::create_dir_all(&folder)?;
    definitions().iter().try_for_each(|each| fs::write(folder.join(each.file), each.yaml()))
}
