//! Members of groups, and who is assigned a role of an application.
//!
//! Adding what is there and removing what is not are no failures, so each call may be made again.

use std::collections::{HashMap, HashSet};

use reqwest::Url;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::json;

use super::{Call, Graph, GraphError, Problem};

/// A page of the longest lists; each entry is some hundred bytes.
const PAGE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// So many pages are a million members; a list that goes on is taken for a mistake.
const PAGES_MAX: usize = 2000;

impl Graph {
    /// Makes an account a member of a group.
    pub(crate) async fn add_member(&self, group: &str, account: &str) -> Result<(), GraphError> {
        let url = self.url(&["groups", group, "members", "$ref"]);
        let reference = self.url(&["directoryObjects", account]);
        let body = json!({ "@odata.id": reference.as_str() });
        match self.call(Call::AddMember, url, Some(&body)).await {
            Err(error) if matches!(error.problem, Problem::Conflict(_)) => Ok(()),
            other => other.map(drop),
        }
    }

    pub(crate) async fn remove_member(&self, group: &str, account: &str) -> Result<(), GraphError> {
        let url = self.url(&["groups", group, "members", account, "$ref"]);
        gone(self.call(Call::RemoveMember, url, None).await.map(drop))
    }

    /// The accounts that are members of a group themselves, not by another group.
    pub(crate) async fn members(&self, group: &str) -> Result<HashSet<String>, GraphError> {
        let mut url = self.url(&["groups", group, "members"]);
        url.set_query(Some("$select=id&$top=999"));
        let members: Vec<Member> = self.pages(Call::ReadMembers, url).await?;
        Ok(members.into_iter().map(|it| it.id).collect())
    }

    /// Assigns a role of an application to an account; gives the assignment's id, unless the account
    /// had the role.
    pub(crate) async fn assign_app_role(
        &self,
        application: &str,
        role: &str,
        account: &str,
    ) -> Result<Option<String>, GraphError> {
        let url = self.url(&["servicePrincipals", application, "appRoleAssignedTo"]);
        let body = json!({ "principalId": account, "resourceId": application, "appRoleId": role });
        match self.call(Call::AssignRole, url, Some(&body)).await {
            Ok(answer) => {
                let Member { id } = self.read(Call::AssignRole, answer).await?;
                Ok(Some(id))
            }
            Err(error) if matches!(error.problem, Problem::Conflict(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) async fn remove_assignment(
        &self,
        application: &str,
        assignment: &str,
    ) -> Result<(), GraphError> {
        let url = self.url(&["servicePrincipals", application, "appRoleAssignedTo", assignment]);
        gone(self.call(Call::RemoveAssignment, url, None).await.map(drop))
    }

    /// The assignments of an account at an application, by role.
    pub(crate) async fn assignments_of(
        &self,
        application: &str,
        account: &str,
    ) -> Result<HashMap<String, String>, GraphError> {
        let url = self.url(&["users", account, "appRoleAssignments"]);
        let found = self.pages::<Assignment>(Call::ReadAssignments, url).await;
        let found = match found {
            // An account that is gone has no roles.
            Err(error) if matches!(error.problem, Problem::NotFound) => Vec::new(),
            other => other?,
        };
        let ours = found.into_iter().filter(|it| it.resource_id.as_deref() == Some(application));
        Ok(ours.map(|it| (it.app_role_id, it.id)).collect())
    }

    /// The accounts that are assigned a role of an application themselves.
    pub(crate) async fn assigned(
        &self,
        application: &str,
        role: &str,
    ) -> Result<HashSet<String>, GraphError> {
        let url = self.url(&["servicePrincipals", application, "appRoleAssignedTo"]);
        let found: Vec<Assignment> = self.pages(Call::ReadAssignments, url).await?;
        let of_role = found.into_iter().filter(|it| it.app_role_id == role);
        Ok(of_role.map(|it| it.principal_id).collect())
    }

    /// Everything that a list holds, over all its pages.
    async fn pages<T: DeserializeOwned>(
        &self,
        call: Call,
        first: Url,
    ) -> Result<Vec<T>, GraphError> {
        let (mut items, mut next) = (Vec::new(), Some(first));
        for _ in 0..PAGES_MAX {
            let Some(url) = next else { return Ok(items) };
            let answer = self.call(call, url, None).await?;
            let page: Page<T> = self.read_at_most(call, answer, PAGE_BYTES_MAX).await?;
            items.extend(page.value);
            next = match page.next {
                Some(link) => Some(self.same_place(&link).ok_or(call.failed(Problem::Unreadable))?),
                None => None,
            };
        }
        Err(call.failed(Problem::Unreadable))
    }

    /// A link that Graph gave: our token goes nowhere but to Graph.
    fn same_place(&self, link: &str) -> Option<Url> {
        Url::parse(link).ok().filter(|it| it.origin() == self.base.origin())
    }
}

/// What is not there need not be removed.
fn gone(removed: Result<(), GraphError>) -> Result<(), GraphError> {
    match removed {
        Err(error) if matches!(error.problem, Problem::NotFound) => Ok(()),
        other => other,
    }
}

#[derive(Deserialize)]
struct Page<T> {
    value: Vec<T>,
    #[serde(default, rename = "@odata.nextLink")]
    next: Option<String>,
}

#[derive(Deserialize)]
struct Member {
    id: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Assignment {
    id: String,
    principal_id: String,
    app_role_id: String,
    #[serde(default)]
    resource_id: Option<String>,
}
