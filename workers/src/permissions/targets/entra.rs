//! Groups of the directory and roles of its applications, by Microsoft Graph.
//!
//! Both are given to an account, which an event names, or the store, or which a search shows. An
//! account that is not to be seen yet is waited for; where one that we saw before is gone, the person
//! may have another by now.

use std::collections::HashSet;

use anyhow::anyhow;
use async_trait::async_trait;
use vestibule_store::Seen;

use super::{Actual, Target, Whom};
use crate::{
    Cause, HandleError,
    graph::{Graph, GraphError, Problem},
};

/// More identities than these nobody is looked for by.
const IDENTITIES_MAX: usize = 3;

#[derive(Debug)]
pub(super) struct Groups {
    graph: Graph,
}

impl Groups {
    pub(super) const fn new(graph: Graph) -> Self {
        Self { graph }
    }
}

#[async_trait]
impl Target for Groups {
    async fn give(&self, group: &str, whom: &mut Whom) -> Result<(), HandleError> {
        let account = account_to_give(&self.graph, whom).await?;
        match self.graph.add_member(group, &account).await {
            Ok(()) => {
                whom.seen.account = Some(account);
                Ok(())
            }
            Err(error) => {
                let other = instead_of(&self.graph, whom, error).await?;
                self.graph.add_member(group, &other).await.map_err(not_to_be_seen)
            }
        }
    }

    async fn take(&self, group: &str, whom: &mut Whom) -> Result<(), HandleError> {
        match account(&self.graph, whom).await? {
            Some(account) => Ok(self.graph.remove_member(group, &account).await?),
            None => Ok(()),
        }
    }

    async fn holds(&self, group: &str, whom: &mut [Whom]) -> Result<Vec<Actual>, HandleError> {
        let members = self.graph.members(group).await?;
        among(&self.graph, &members, whom).await
    }
}

#[derive(Debug)]
pub(super) struct AppRoles {
    graph: Graph,
    application: String,
}

impl AppRoles {
    pub(super) const fn new(graph: Graph, application: String) -> Self {
        Self { graph, application }
    }
}

#[async_trait]
impl Target for AppRoles {
    async fn give(&self, role: &str, whom: &mut Whom) -> Result<(), HandleError> {
        let account = account_to_give(&self.graph, whom).await?;
        let assigned = match self.graph.assign_app_role(&self.application, role, &account).await {
            Ok(assigned) => {
                whom.seen.account = Some(account);
                assigned
            }
            Err(error) => {
                let other = instead_of(&self.graph, whom, error).await?;
                let assigned = self.graph.assign_app_role(&self.application, role, &other).await;
                assigned.map_err(not_to_be_seen)?
            }
        };
        if let Some(assignment) = assigned {
            whom.seen.membership = Some(assignment);
        }
        Ok(())
    }

    async fn take(&self, role: &str, whom: &mut Whom) -> Result<(), HandleError> {
        let Some(account) = account(&self.graph, whom).await? else { return Ok(()) };
        // The one that we made, and whichever the directory shows: a list lags behind what was
        // written, and an assignment may have been made anew by somebody else.
        if let Some(assignment) = &whom.seen.membership {
            self.graph.remove_assignment(&self.application, assignment).await?;
        }
        let mut shown = self.graph.assignments_of(&self.application, &account).await?;
        if let Some(assignment) = shown.remove(role) {
            self.graph.remove_assignment(&self.application, &assignment).await?;
        }
        Ok(())
    }

    async fn holds(&self, role: &str, whom: &mut [Whom]) -> Result<Vec<Actual>, HandleError> {
        let assigned = self.graph.assigned(&self.application, role).await?;
        among(&self.graph, &assigned, whom).await
    }
}

/// The group, or the account, is not there, or not in that part of the directory which we asked.
fn not_to_be_seen(error: GraphError) -> HandleError {
    if matches!(error.problem, Problem::NotFound) {
        HandleError::retry(Cause::NotYet, error)
    } else {
        error.into()
    }
}

async fn among(
    graph: &Graph,
    holders: &HashSet<String>,
    whom: &mut [Whom],
) -> Result<Vec<Actual>, HandleError> {
    let mut actual = Vec::with_capacity(whom.len());
    for whom in whom {
        let account = account(graph, whom).await?;
        actual.push(account.map_or(Actual::NoAccount, |it| Actual::of(holders.contains(&it))));
    }
    Ok(actual)
}

async fn account_to_give(graph: &Graph, whom: &mut Whom) -> Result<String, HandleError> {
    account(graph, whom).await?.ok_or_else(|| {
        let source = anyhow!(
            "the directory shows no account of the person yet; the event is tried again, and \
             `on = \"confirmed\"` waits for the account"
        );
        HandleError::retry(Cause::NotYet, source)
    })
}

/// The account to give to where the one that was given to before is gone; else the failure stands.
/// One that we never saw is waited for: it may be too new, and whom a search shows somebody else.
async fn instead_of(
    graph: &Graph,
    whom: &mut Whom,
    error: GraphError,
) -> Result<String, HandleError> {
    if !matches!(error.problem, Problem::NotFound) {
        return Err(error.into());
    }
    let Some(former) = whom.seen.account.clone() else { return Err(not_to_be_seen(error)) };
    // The group may be what is not there: only the account itself tells that it is gone.
    if graph.has_user(&former).await? {
        return Err(not_to_be_seen(error));
    }
    let found = search(graph, whom).await?.filter(|it| *it != former);
    let Some(found) = found else { return Err(not_to_be_seen(error)) };
    // Noted before it is given anything: the answer to that may be lost, and the role is to be found.
    whom.seen = Seen { account: Some(found.clone()), membership: None };
    Ok(found)
}

/// The account of somebody, if it is known or to be found.
async fn account(graph: &Graph, whom: &mut Whom) -> Result<Option<String>, HandleError> {
    // What was seen is of the account that the role was given to. When an event tells of another one
    // it is forgotten, and what the event told holds.
    if let Some(account) = whom.seen.account.clone().or_else(|| whom.object_id.clone()) {
        return Ok(Some(account));
    }
    whom.seen.account = search(graph, whom).await?;
    Ok(whom.seen.account.clone())
}

async fn search(graph: &Graph, whom: &Whom) -> Result<Option<String>, HandleError> {
    for identity in whom.identities.iter().take(IDENTITIES_MAX) {
        if let Some(found) = graph.find_by_identity(identity).await?.into_iter().next() {
            return Ok(Some(found.id));
        }
    }
    let Some(email) = &whom.email else { return Ok(None) };
    let mut found = graph.find_by_mail(email.expose()).await?;
    if found.len() > 1 {
        // To give somebody's role to somebody else would be worse than to give it to nobody.
        let source = anyhow!(
            "several accounts of the directory have the person's address; see to it that one has, \
             then redrive the event"
        );
        return Err(HandleError::park(Cause::Refused, source));
    }
    Ok(found.pop().map(|it| it.id))
}
