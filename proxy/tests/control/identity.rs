use std::time::{Duration, SystemTime};

use sluice_proxy::{
    identity::{Renewer, SignError},
    tls::IdentityHandle,
};
use sluice_xds::sluice::identity::v1::{SignRequest, SignResponse};
use tonic::Status;

use crate::{
    pki::{CONTROLLER, Ca, FLEET, Projected},
    server::{Server, soon},
};

fn signed(ca: &Ca, request: &SignRequest, life: Duration) -> SignResponse {
    SignResponse {
        certificate_chain_pem: ca.sign(&request.csr_der, FLEET, life),
        trust_bundle_pem: ca.pem.clone(),
        not_before: Some(SystemTime::now().into()),
        not_after: Some((SystemTime::now() + life).into()),
    }
}

const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn a_certificate_is_signed_on_the_strength_of_the_token_and_taken_into_use() {
    let ca = Ca::new();
    let projected = Projected::new(&ca);
    let mut server = Server::start(&ca).await;
    let handle = IdentityHandle::default();
    let renewer = Renewer::new(server.controller(&projected), projected.token(), handle.clone());
    let current = renewer.current();
    assert!(!handle.is_set());

    let answer = async {
        let (request, answer) = server.signs.recv().await.unwrap();
        assert_eq!(request.token, "token-1");
        let _ = answer.send(Ok(signed(&ca, &request, HOUR)));
    };
    let (renewed, ()) = soon("signing", async { tokio::join!(renewer.renew(), answer) }).await;
    renewed.unwrap();
    assert!(handle.is_set());
    assert!(current.borrow().as_ref().unwrap().valid_at(SystemTime::now()));
}

#[tokio::test]
async fn a_certificate_is_renewed_before_its_end_with_the_token_of_then() {
    let ca = Ca::new();
    let projected = Projected::new(&ca);
    let mut server = Server::start(&ca).await;
    let renewer = Renewer::new(server.controller(&projected), projected.token(), IdentityHandle::default());
    let mut current = renewer.current();
    let task = tokio::spawn(renewer.run());

    let (request, answer) = soon("the first request", server.signs.recv()).await.unwrap();
    let life = Duration::from_secs(4);
    let _ = answer.send(Ok(signed(&ca, &request, life)));
    let first = soon("the first certificate", current.wait_for(Option::is_some)).await.unwrap().clone().unwrap();
    projected.write_token("token-2");

    let (again, answer) = soon("the renewal", server.signs.recv()).await.unwrap();
    assert!(first.valid_at(SystemTime::now()), "renewed after the end");
    assert_eq!(again.token, "token-2");
    assert_ne!(again.csr_der, request.csr_der, "a new key each time");
    // A failed renewal keeps the current certificate, and is tried again.
    let _ = answer.send(Err(Status::internal("no")));
    let (request, answer) = soon("another try", server.signs.recv()).await.unwrap();
    assert!(std::sync::Arc::ptr_eq(current.borrow().as_ref().unwrap(), &first));
    let _ = answer.send(Ok(signed(&ca, &request, HOUR)));
    soon("the second certificate", current.wait_for(|held| held.as_ref().unwrap().not_after > first.not_after + life))
        .await
        .unwrap();
    task.abort();
}

#[tokio::test]
async fn a_certificate_whose_root_is_withdrawn_is_renewed_at_once() {
    let (old, new) = (Ca::new(), Ca::new());
    let projected = Projected::new(&old);
    let mut server = Server::start(&old).await;
    let handle = IdentityHandle::default();
    let renewer = Renewer::new(server.controller(&projected), projected.token(), handle.clone())
        .bundle_interval(Duration::from_millis(50));
    let mut current = renewer.current();
    let task = tokio::spawn(renewer.run());
    let (request, answer) = soon("the first request", server.signs.recv()).await.unwrap();
    let _ = answer.send(Ok(signed(&old, &request, HOUR)));
    let first = soon("the first certificate", current.wait_for(Option::is_some)).await.unwrap().clone().unwrap();
    assert!(handle.trusts_itself());

    // Added first, which is no reason to renew.
    projected.write_bundle(&format!("{}{}", old.pem, new.pem));
    let address = server.stop().await;
    let mut server = Server::start_as(&new, CONTROLLER, address).await;
    assert!(std::sync::Arc::ptr_eq(current.borrow().as_ref().unwrap(), &first));

    projected.write_bundle(&new.pem);
    let (request, answer) = soon("the renewal", server.signs.recv()).await.unwrap();
    assert!(!handle.trusts_itself());
    let _ = answer.send(Ok(signed(&new, &request, HOUR)));
    let other = |held: &Option<_>| held.as_ref().is_some_and(|held| !std::sync::Arc::ptr_eq(held, &first));
    soon("the second certificate", current.wait_for(other)).await.unwrap();
    assert!(handle.trusts_itself());
    task.abort();
}

#[tokio::test]
async fn a_server_with_another_id_or_another_ca_is_not_asked() {
    let ca = Ca::new();
    let projected = Projected::new(&ca);
    let localhost = "127.0.0.1:0".parse().unwrap();
    let other_ca = Ca::new();
    for (ca, id) in [(&ca, FLEET), (&other_ca, CONTROLLER)] {
        let mut server = Server::start_as(ca, id, localhost).await;
        let handle = IdentityHandle::default();
        let renewer = Renewer::new(server.controller(&projected), projected.token(), handle.clone());
        let error = soon("the refusal", renewer.renew()).await.unwrap_err();
        assert!(matches!(error, SignError::Connect(_)), "{error}");
        assert!(server.signs.try_recv().is_err(), "the token was sent to a stranger");
        assert!(!handle.is_set());
    }
}

#[tokio::test]
async fn an_answer_for_another_key_is_refused() {
    let ca = Ca::new();
    let projected = Projected::new(&ca);
    let mut server = Server::start(&ca).await;
    let handle = IdentityHandle::default();
    let renewer = Renewer::new(server.controller(&projected), projected.token(), handle.clone());
    let answer = async {
        let (_, answer) = server.signs.recv().await.unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
        let request = SignRequest { csr_der: csr.der().to_vec(), token: String::new() };
        let _ = answer.send(Ok(signed(&ca, &request, HOUR)));
    };
    let (renewed, ()) = soon("signing", async { tokio::join!(renewer.renew(), answer) }).await;
    assert!(matches!(renewed, Err(SignError::Identity(_))), "{renewed:?}");
    assert!(!handle.is_set());
}

#[tokio::test]
async fn a_missing_token_is_named() {
    let ca = Ca::new();
    let projected = Projected::new(&ca);
    let server = Server::start(&ca).await;
    let nowhere = projected.token().with_file_name("nowhere");
    let renewer = Renewer::new(server.controller(&projected), nowhere, IdentityHandle::default());
    let error = soon("the error", renewer.renew()).await.unwrap_err();
    assert!(error.to_string().contains("nowhere"), "{error}");
}
