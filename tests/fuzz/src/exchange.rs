//! Messages of the exchange protocol.

use bytes::Bytes;
use hermes_p2p::exchange::codec::{
    ANSWER_LEN_MAX_BYTES, Answer, GET_CHUNKS_MAX, GRANT_LEN_MAX_BYTES, LENGTH_LEN_BYTES, NAME_ADDRESS_LEN_MAX_BYTES,
    NAME_ADDRESSES_MAX, REFER_PEERS_MAX, Request, Want, frame_len,
};

use crate::parts::numbers;

/// Requests and answers have one encoding each (but HELLO, which a later version may make longer), and name no chunk
/// that the layer does not have.
pub fn exchange_codec(data: &[u8]) {
    let (chunk_count, data) = numbers::<4>(data);
    let chunk_count = u32::from_le_bytes(chunk_count);
    let frame = Bytes::copy_from_slice(data);
    if let Ok(request) = Request::decode(&frame) {
        match &request {
            Request::Get { chunks, want, extent, .. } => {
                assert!((1..=u64::from(GET_CHUNKS_MAX)).contains(&chunks.chunk_count()));
                assert!(*want == Want::Here || chunks.within(extent.clone()) == *chunks);
                assert!(extent.start < extent.end || *extent == (0..0));
            }
            Request::Grant { grant } => assert!((1..=GRANT_LEN_MAX_BYTES).contains(&grant.len())),
            _ => {}
        }
        let is_hello = matches!(request, Request::Hello { .. });
        check_encoding(&frame, is_hello, |out| request.encode(out));
    }
    if let Ok(answer) = Answer::decode(&frame, chunk_count) {
        match &answer {
            Answer::HaveMap { chunks, .. }
            | Answer::HaveMore { chunks }
            | Answer::Lacks { chunks }
            | Answer::Delegate { chunks } => {
                assert!(chunks.iter().all(|run| run.end <= chunk_count));
            }
            Answer::Refer { chunks, peers } => {
                assert!(chunks.iter().all(|run| run.end <= chunk_count));
                assert!((1..=REFER_PEERS_MAX).contains(&peers.len()));
                for name in peers {
                    assert!(name.addresses.len() <= NAME_ADDRESSES_MAX);
                    assert!(name.addresses.iter().all(|address| address.len() <= NAME_ADDRESS_LEN_MAX_BYTES));
                }
            }
            Answer::Data { chunk, .. } => assert!(chunk.0 < chunk_count),
            _ => {}
        }
        let is_hello = matches!(answer, Answer::Hello { .. });
        check_encoding(&frame, is_hello, |out| answer.encode(out));
    }
}

fn check_encoding(frame: &Bytes, is_hello: bool, encode: impl FnOnce(&mut Vec<u8>)) {
    let mut out = Vec::new();
    encode(&mut out);
    let (head, body) = out.split_first_chunk::<LENGTH_LEN_BYTES>().expect("an encoded frame has a length");
    assert_eq!(frame_len(*head, ANSWER_LEN_MAX_BYTES), Ok(body.len()));
    if is_hello {
        assert!(frame.starts_with(body));
    } else {
        assert_eq!(body, frame, "a message has a second encoding");
    }
}
