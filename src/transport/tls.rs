//! TLS 1.3 with peers known by fingerprint.
//!
//! Both sides show a self-signed certificate and prove its key by signing the handshake. We accept a peer if
//! the fingerprint of its certificate is in the trust store, as it is at that moment, and the signature is
//! right; names, dates and issuers mean nothing here. A verifier is made per connection and remembers the
//! fingerprint that it refused, for the error message.
//!
//! Session tickets, resumption and early data are off: each connection proves both keys.

use std::sync::{Arc, OnceLock};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, SignatureScheme};

use super::TransportError;
use crate::identity::trust::TrustStore;
use crate::identity::{Fingerprint, Identity, Node};

/// Names the application protocol, so that another QUIC service is never mistaken for a node.
const ALPN: &[u8] = b"migrate";

/// Accepts the peer of one connection.
#[derive(Debug)]
pub(super) struct Verifier {
    trust: TrustStore,
    provider: Arc<CryptoProvider>,
    refused: OnceLock<Fingerprint>,
}

impl Verifier {
    fn new(node: &Node, provider: &Arc<CryptoProvider>) -> Arc<Self> {
        Arc::new(Self { trust: node.trust().clone(), provider: provider.clone(), refused: OnceLock::new() })
    }

    /// The fingerprint that was refused, if one was.
    pub(super) fn refused(&self) -> Option<Fingerprint> {
        self.refused.get().copied()
    }

    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let fingerprint = Fingerprint::of(certificate);
        let accepted = self.trust.accepts(&fingerprint).unwrap_or_else(|error| {
            tracing::error!(%error, "the list of trusted peers cannot be used: nobody is accepted");
            false
        });
        if accepted {
            return Ok(());
        }
        let _ = self.refused.set(fingerprint);
        // Its alert is access_denied: the peer learns why, and tells its operator.
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn check_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn no_tls12() -> rustls::Error {
    rustls::PeerIncompatible::ServerDoesNotSupportTls12Or13.into()
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

/// Configuration for one outgoing connection, and its verifier.
pub(super) fn client(node: &Node) -> Result<(QuicClientConfig, Arc<Verifier>), TransportError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Verifier::new(node, &provider);
    let (chain, key) = shown(node.identity());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TransportError::Tls)?
        .dangerous()
        .with_custom_certificate_verifier(verifier.clone())
        .with_client_auth_cert(chain, key)
        .map_err(TransportError::Tls)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_early_data = false;
    config.enable_sni = false;
    let config = QuicClientConfig::try_from(config).map_err(|_| no_initial_suite())?;
    Ok((config, verifier))
}

/// Configuration for one incoming connection, and its verifier.
pub(super) fn server(node: &Node) -> Result<(QuicServerConfig, Arc<Verifier>), TransportError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Verifier::new(node, &provider);
    let (chain, key) = shown(node.identity());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TransportError::Tls)?
        .with_client_cert_verifier(verifier.clone())
        .with_single_cert(chain, key)
        .map_err(TransportError::Tls)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
    let config = QuicServerConfig::try_from(config).map_err(|_| no_initial_suite())?;
    Ok((config, verifier))
}

type Shown = (Vec<CertificateDer<'static>>, rustls::pki_types::PrivateKeyDer<'static>);

fn shown(identity: &Identity) -> Shown {
    (vec![identity.certificate()], identity.key())
}

fn no_initial_suite() -> TransportError {
    TransportError::Tls(rustls::Error::General("no cipher suite for QUIC's first packets".to_owned()))
}
