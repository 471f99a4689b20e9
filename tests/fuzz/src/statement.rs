//! Signed statements.

use ed25519_dalek::Signer as _;
use hermes_image::ids::Digest;
use hermes_image::statement::{DOMAIN, SigningKey, Statement};
use serde_json::json;

/// Seed of the key that the target trusts and signs with.
pub const SEED: [u8; 32] = [42; 32];

/// The manifest that the target asks for, when the text names none.
const MANIFEST: Digest = Digest([0x11; 32]);

/// Nothing is accepted that the key has not signed; a signed text that is accepted survives being signed again.
pub fn statement(data: &[u8]) {
    let key = SigningKey::from_seed(&SEED);
    let trusted = [key.public()];
    // As the whole signed form: only what `sign` itself made can pass, and that is in the corpus.
    let opened = Statement::open(data, MANIFEST, &trusted);
    assert!(Statement::open(data, MANIFEST, &[]).is_err(), "accepted without a trusted key");
    if let Ok(statement) = opened {
        assert_eq!(Statement::open(&key.sign(&statement), MANIFEST, &trusted).ok(), Some(statement));
    }
    // As the text that is signed, about whatever manifest it names.
    let Ok(text) = std::str::from_utf8(data) else { return };
    let manifest = serde_json::from_str::<serde_json::Value>(text)
        .ok()
        .and_then(|value| value.get("manifest")?.as_str()?.parse().ok())
        .unwrap_or(MANIFEST);
    let signature = ed25519_dalek::SigningKey::from_bytes(&SEED).sign(&[DOMAIN, data].concat());
    let key_text = key.public().to_string();
    let signed = json!({
        "statement": text,
        "signatures": [{"key": key_text, "signature": hex::encode(signature.to_bytes())}],
    });
    let signed = serde_json::to_vec(&signed).expect("texts only");
    if let Ok(statement) = Statement::open(&signed, manifest, &trusted) {
        assert_eq!(statement.manifest, manifest);
        assert_eq!(Statement::open(&key.sign(&statement), manifest, &trusted).ok(), Some(statement));
    }
}
