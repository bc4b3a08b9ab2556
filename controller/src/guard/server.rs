//! The port for members of the fleet that report: beside xDS, on the same connection.

use std::{pin::Pin, sync::Arc};

use futures::{Stream, StreamExt};
use sluice_xds::sluice::guard::v1::{
    OutcomeReport, OutcomeWatch,
    outcome_service_server::{OutcomeService, OutcomeServiceServer},
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::Guard;
use crate::{
    ads::{Leadership, Session},
    mesh::{Settings, Snapshot},
};

/// Messages that a member has not read: it needs the newest only, so we wait for it.
const UNREAD: usize = 1;

/// The service. Only the leader listens.
pub struct Outcomes {
    guard: Guard,
    settings: Arc<Settings>,
    snapshot: watch::Receiver<Arc<Snapshot>>,
    leadership: Arc<dyn Leadership>,
}

impl Outcomes {
    /// The tonic service.
    #[must_use]
    pub fn server(
        guard: Guard,
        settings: Arc<Settings>,
        snapshot: watch::Receiver<Arc<Snapshot>>,
        leadership: Arc<dyn Leadership>,
    ) -> OutcomeServiceServer<Self> {
        OutcomeServiceServer::new(Self { guard, settings, snapshot, leadership })
    }

    /// Only a member of the fleet is heard, by its certificate and by what the API server says of its Pod: what it reports can take
    /// a canary back.
    #[allow(clippy::result_large_err)]
    fn session<T>(&self, request: &Request<T>) -> Result<Session, Status> {
        let session = Session::begin(&*self.leadership, request)?;
        let pod = &session.who.pod;
        if session.who.id != self.settings.fleet_id || !self.snapshot.borrow().members.contains_key(&pod.uid) {
            return Err(Status::permission_denied(format!(
                "Pod {} (uid {}) is no member of the fleet that this controller knows (yet)",
                pod.common_name(),
                pod.uid
            )));
        }
        Ok(session)
    }
}

#[tonic::async_trait]
impl OutcomeService for Outcomes {
    type ReportStream = Pin<Box<dyn Stream<Item = Result<OutcomeWatch, Status>> + Send>>;

    /// The task lives as long as the stream: it ends when the member, the term or the member's certificate does.
    async fn report(&self, request: Request<Streaming<OutcomeReport>>) -> Result<Response<Self::ReportStream>, Status> {
        let session = self.session(&request)?;
        let (sender, receiver) = mpsc::channel(UNREAD);
        tokio::spawn(serve(self.guard.clone(), session, request.into_inner(), sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

async fn serve(
    guard: Guard,
    mut session: Session,
    mut reports: impl Stream<Item = Result<OutcomeReport, Status>> + Unpin,
    sender: mpsc::Sender<Result<OutcomeWatch, Status>>,
) {
    let _member = guard.member();
    let mut wanted = guard.wanted();
    let mut news = true;
    loop {
        tokio::select! {
            report = reports.next() => match report {
                Some(Ok(report)) => guard.take(&report),
                Some(Err(_)) | None => return,
            },
            // Waits for room first, so that what is sent is the newest.
            room = sender.reserve(), if news => {
                let Ok(room) = room else { return };
                let message = wanted.borrow_and_update().clone();
                room.send(Ok((*message).clone()));
                news = false;
            }
            changed = wanted.changed() => {
                if changed.is_err() {
                    return;
                }
                news = true;
            }
            end = session.end() => {
                let _ = sender.try_send(Err(end));
                return;
            }
        }
    }
}
