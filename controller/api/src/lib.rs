//! The wire format between the controller and the nodes: generated from `proto/`, and what both need to speak it.
//!
//! A crate of its own, so that code is generated, and the generator compiled, once; and so that nodes need nothing of the
//! controller but its language. What calls and fields mean, and how versions are agreed on, stands in
//! `proto/controller.proto`; how to reach a controller and what it asks of a caller, in docs/controller-api.md.

/// Version 1.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated; described in proto/")]
pub mod v1 {
    tonic::include_proto!("hermes.controller.v1");
}

/// How messages become bytes: by Protocol Buffers, through small buffers.
///
/// A stream keeps the buffer that it encodes with. By default that grows to what it has sent at once, some 64 KB, of which
/// a controller of 5,000 streams would have 300 MB.
#[derive(Debug)]
pub struct Codec<T, U>(std::marker::PhantomData<(T, U)>);

/// What a buffer begins with: a change of one image.
const BUFFER_LEN_BYTES: usize = 4 * 1024;
/// A buffer of this length is sent before more is put into it.
const BUFFER_FULL_BYTES: usize = 8 * 1024;

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(std::marker::PhantomData)
    }
}

impl<T: Message + Send + 'static, U: Message + Default + Send + 'static> tonic::codec::Codec for Codec<T, U> {
    type Encode = T;
    type Decode = U;
    type Encoder = tonic_prost::ProstEncoder<T>;
    type Decoder = tonic_prost::ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        let settings = tonic::codec::BufferSettings::new(BUFFER_LEN_BYTES, BUFFER_FULL_BYTES);
        tonic_prost::ProstCodec::<T, U>::raw_encoder(settings)
    }

    fn decoder(&mut self) -> Self::Decoder {
        let settings = tonic::codec::BufferSettings::new(BUFFER_LEN_BYTES, BUFFER_FULL_BYTES);
        tonic_prost::ProstCodec::<T, U>::raw_decoder(settings)
    }
}

/// For encoding and decoding messages outside of calls.
pub use prost::Message;

/// The DNS name in the controller's certificate, whatever address it is reached by.
pub const SERVER_NAME: &str = "hermes-controller";
/// The audience of ServiceAccount tokens that nodes join with.
pub const TOKEN_AUDIENCE: &str = "hermes-controller";
/// `der` as PEM (RFC 7468), which the gRPC library takes keys and certificates in.
pub fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines = text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).expect("base64 is ASCII"));
    let body: String = lines.flat_map(|line| [line, "\n"]).collect();
    format!("-----BEGIN {label}-----\n{body}-----END {label}-----\n")
}

/// The oldest version that this build speaks.
pub const VERSION_MIN: u32 = 1;
/// The newest version that this build speaks.
pub const VERSION_MAX: u32 = 1;
