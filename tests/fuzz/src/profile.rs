//! Profiles of starts, and the records that they are made of.

use hermes_policy::profile::{PROFILE_LEN_MAX_BYTES, codec, merge};

/// Chunks of records that are merged; more would only take time.
const MERGED_CHUNKS_MAX: u64 = 1 << 14;

/// All have one encoding each, and what is merged of records fits its bound and survives its own.
pub fn start_profile(data: &[u8]) {
    if let Ok(profile) = codec::decode(data) {
        assert_eq!(codec::encode(&profile), data, "a profile has a second encoding");
    }
    if let Ok(record) = codec::decode_record(data) {
        assert_eq!(codec::encode_record(&record), data, "a record has a second encoding");
    }
    let Ok(records) = codec::decode_records(data) else { return };
    assert_eq!(codec::encode_records(&records), data, "a list of records has a second encoding");
    if records.iter().map(|record| record.chunk_count()).sum::<u64>() > MERGED_CHUNKS_MAX {
        return;
    }
    if let Some(profile) = merge(&records) {
        let bytes = codec::encode(&profile);
        assert!(bytes.len() <= PROFILE_LEN_MAX_BYTES);
        assert_eq!(codec::decode(&bytes), Ok(profile));
    }
}
