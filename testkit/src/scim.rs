//! A server of SCIM 2.0 with users and groups.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use crate::{Process, eventually, tools};

const LIMIT: Duration = Duration::from_secs(30);

/// A real SCIM server (scim2-server), in memory, on a port it chose itself; gone when dropped.
#[derive(Debug)]
pub struct Scim {
    process: Process,
    port: u16,
    orders: u64,
}

impl Scim {
    /// The bearer token that it wants to see.
    pub const TOKEN: &str = "scim~token";

    pub async fn start() -> anyhow::Result<Self> {
        let mut command = Command::new(tools::python()?);
        command.args(["-c", include_str!("scim.py"), Self::TOKEN]);
        let installed = tools::installed().join("scim");
        if installed.exists() {
            command.env("PYTHONPATH", installed);
        }
        let mut process = Process::spawn(&command)?;
        let line = process
            .wait_for_line(LIMIT, |line| line.contains("\"port\""))
            .await
            .context("the SCIM server did not start: run ./scripts/test, or install the Python package scim2-server")?;
        let fact: Value = serde_json::from_str(&line)?;
        let port = fact["port"].as_u64().and_then(|port| port.try_into().ok());
        Ok(Self { process, port: port.context("the SCIM server told no port")?, orders: 0 })
    }

    /// The base URL: `http://127.0.0.1:…/v2`.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/v2", self.port)
    }

    /// Answers the next call of a method with this status and nothing done; several are given one after
    /// the other. `retry_after` is the header of that name.
    pub async fn refuse_next(
        &mut self,
        method: &str,
        status: u16,
        retry_after: Option<&str>,
    ) -> anyhow::Result<()> {
        let headers = retry_after.map(|it| json!({ "Retry-After": it })).unwrap_or(json!({}));
        self.plan(json!({ "method": method, "status": status, "headers": headers })).await
    }

    /// Does what the next call of a method asks for, and answers 503 all the same.
    pub async fn hide_next(&mut self, method: &str) -> anyhow::Result<()> {
        self.plan(json!({ "method": method, "status": 503, "act": true })).await
    }

    /// Makes a group, and gives its id.
    pub async fn add_group(&mut self, name: &str) -> anyhow::Result<String> {
        let group = json!({
            "schemas": ["urn:ietf:params:scim:schemas:core:2.0:Group"], "displayName": name,
        });
        let group = self.order("POST", "/Groups", Some(group)).await?;
        Ok(group["id"].as_str().context("a group has an id")?.to_owned())
    }

    /// All users.
    pub async fn users(&mut self) -> anyhow::Result<Vec<Value>> {
        let list = self.order("GET", "/Users?count=10000", None).await?;
        Ok(list["Resources"].as_array().cloned().unwrap_or_default())
    }

    /// Gives a user another name.
    pub async fn rename_user(&mut self, id: &str, name: &str) -> anyhow::Result<()> {
        let patch = json!({
            "schemas": ["urn:ietf:params:scim:api:messages:2.0:PatchOp"],
            "Operations": [{ "op": "replace", "path": "userName", "value": name }],
        });
        self.order("PATCH", &format!("/Users/{id}"), Some(patch)).await.map(drop)
    }

    /// Deletes a user.
    pub async fn remove_user(&mut self, id: &str) -> anyhow::Result<()> {
        self.order("DELETE", &format!("/Users/{id}"), None).await.map(drop)
    }

    /// The names of those who are in a group, sorted.
    pub async fn members(&mut self, group: &str) -> anyhow::Result<Vec<String>> {
        let users = self.users().await?;
        let group = self.order("GET", &format!("/Groups/{group}"), None).await?;
        let members = group["members"].as_array().cloned().unwrap_or_default();
        let name_of = |member: &Value| {
            let user = users.iter().find(|it| it["id"] == member["value"]);
            user.and_then(|it| it["userName"].as_str()).unwrap_or("nobody known").to_owned()
        };
        let mut names: Vec<_> = members.iter().map(name_of).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Takes everybody out of a group, behind everybody's back.
    pub async fn empty_group(&mut self, group: &str) -> anyhow::Result<()> {
        let patch = json!({
            "schemas": ["urn:ietf:params:scim:api:messages:2.0:PatchOp"],
            "Operations": [{ "op": "remove", "path": "members" }],
        });
        self.order("PATCH", &format!("/Groups/{group}"), Some(patch)).await.map(drop)
    }

    /// The calls that others have made so far, such as `POST /Users`, with what they were answered.
    pub fn calls(&self) -> Vec<(String, u16)> {
        let output = self.process.stdout();
        let facts = output.lines().flat_map(serde_json::from_str::<Value>);
        let call = |fact: Value| {
            Some((fact["call"].as_str()?.to_owned(), fact["status"].as_u64()?.try_into().ok()?))
        };
        facts.filter_map(call).collect()
    }

    pub fn pause(&self) {
        self.process.pause();
    }

    pub fn resume(&self) {
        self.process.resume();
    }

    async fn plan(&mut self, plan: Value) -> anyhow::Result<()> {
        let wanted = self.lines_with("\"planned\"") + 1;
        self.process.write_line(&json!({ "plan": plan }).to_string())?;
        eventually(LIMIT, "the SCIM server has taken the plan", async || {
            self.lines_with("\"planned\"") >= wanted
        })
        .await
    }

    async fn order(
        &mut self,
        method: &str,
        path: &str,
        body: Option<Value>,
    ) -> anyhow::Result<Value> {
        self.orders += 1;
        let number = self.orders;
        let order = json!({ "do": number, "method": method, "path": path, "body": body });
        self.process.write_line(&order.to_string())?;
        let done = eventually(LIMIT, "the SCIM server has done as it was told", async || {
            let output = self.process.stdout();
            let mut facts = output.lines().flat_map(serde_json::from_str::<Value>);
            facts.find(|fact| fact["done"] == number)
        })
        .await?;
        ensure!(done["status"].as_u64().is_some_and(|it| it < 300), "{method} {path}: {done}");
        Ok(done["body"].clone())
    }

    fn lines_with(&self, part: &str) -> usize {
        self.process.stdout().lines().filter(|line| line.contains(part)).count()
    }
}
