//! Messages of the exchange protocol.

use bytes::Bytes;
use hermes_p2p::exchange::codec::{ANSWER_LEN_MAX_BYTES, Answer, GET_CHUNKS_MAX, LENGTH_LEN_BYTES, Request, frame_len};

use crate::parts::numbers;

/// Requests and answers have one encoding each (but HELLO, which a later version may make longer), and name no chunk
/// that the layer does not have.
pub fn exchange_codec(data: &[u8]) {
    let (chunk_count, data) = numbers::<4>(data);
    let chunk_count = u32::from_le_bytes(chunk_count);
    let frame = Bytes::copy_from_slice(data);
    if let Ok(request) = Request::decode(&frame) {
        if let Request::Get { chunks, .. } = &request {
            assert!((1..=u64::from(GET_CHUNKS_MAX)).contains(&chunks.chunk_count()));
        }
        let is_hello = matches!(request, Request::Hello { .. });
        check_encoding(&frame, is_hello, |out| request.encode(out));
    }
    if let Ok(answer) = Answer::decode(&frame, chunk_count) {
        match &answer {
            Answer::HaveMap { chunks, .. } | Answer::HaveMore { chunks } | Answer::Lacks { chunks } => {
                assert!(chunks.iter().all(|run| run.end <= chunk_count));
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
