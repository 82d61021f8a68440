//! Bringing a database to the schema of this version.
//!
//! Migrations only go forward, and each leaves the version before it working: it adds, and takes
//! away only what no released version uses any more. So a database that is newer than this binary
//! is fine, and processes of two versions can run side by side during a roll-out.

use std::collections::HashSet;

use sqlx::{
    ConnectOptions, Connection,
    migrate::{Migrate, MigrateError, Migrator},
};

use crate::{Store, StoreError, error::Cause, session::fetch_all, store::Database};

/// A step from one schema to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migration {
    pub version: i64,
    pub description: String,
}

static SQLITE: Migrator = sqlx::migrate!("../migrations/sqlite");
static POSTGRES: Migrator = sqlx::migrate!("../migrations/postgres");

impl Store {
    /// Applies what is missing and says what that was; several processes at once are safe.
    ///
    /// Waits for as long as another process migrates, and as long as a migration takes: here the
    /// limits of the store do not hold.
    pub async fn migrate(&self) -> Result<Vec<Migration>, StoreError> {
        match &*self.database {
            Database::Sqlite { file, .. } => {
                let mut connection = file.connect().await?;
                // One transaction around everything takes the place of the lock that SQLite's
                // migrations lack.
                let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await?;
                let applied = apply_missing(&SQLITE, &mut *transaction).await?;
                transaction.commit().await?;
                connection.close().await?;
                Ok(applied)
            }
            Database::Postgres { server, .. } => {
                let mut connection = server.connect().await?;
                // Held by the connection, so a process that dies lets go of it.
                connection.lock().await.map_err(failed)?;
                let applied = apply_missing(&POSTGRES, &mut connection).await?;
                connection.unlock().await.map_err(failed)?;
                connection.close().await?;
                Ok(applied)
            }
        }
    }

    /// Whether nothing is missing. A database that is newer than this version is current too.
    pub async fn schema_is_current(&self) -> Result<bool, StoreError> {
        let migrator = match &*self.database {
            Database::Sqlite { .. } => &SQLITE,
            Database::Postgres { .. } => &POSTGRES,
        };
        let mut session = self.read().await?;
        let applied: Result<Vec<(i64,)>, _> = fetch_all!(
            &mut session,
            sqlx::query_as("SELECT version FROM _sqlx_migrations WHERE success")
        );
        match applied {
            Ok(applied) => {
                let applied: HashSet<_> = applied.into_iter().map(|(version,)| version).collect();
                Ok(migrator.iter().all(|migration| applied.contains(&migration.version)))
            }
            // An empty database has no list of migrations yet.
            Err(StoreError::Misconfigured(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Runs on a connection that nobody else migrates through.
async fn apply_missing<C: Migrate>(
    migrator: &'static Migrator,
    connection: &mut C,
) -> Result<Vec<Migration>, StoreError> {
    let migrator = Migrator {
        migrations: migrator.migrations.clone(),
        ignore_missing: true,
        locking: false,
        ..Migrator::DEFAULT
    };
    connection.ensure_migrations_table(&migrator.table_name).await.map_err(failed)?;
    let before = connection.list_applied_migrations(&migrator.table_name).await.map_err(failed)?;
    let before: HashSet<_> = before.into_iter().map(|migration| migration.version).collect();
    migrator.run_direct(None, connection, false).await.map_err(failed)?;
    Ok(migrator
        .iter()
        .filter(|migration| !before.contains(&migration.version))
        .map(|migration| Migration {
            version: migration.version,
            description: migration.description.to_string(),
        })
        .collect())
}

fn failed(error: MigrateError) -> StoreError {
    match error {
        MigrateError::Execute(error) => error.into(),
        MigrateError::ExecuteMigration(error, version) => match StoreError::from(error) {
            StoreError::Unavailable(cause) => StoreError::Unavailable(cause),
            error => StoreError::Misconfigured(Cause::new(format!(
                "migration {version} failed: {}",
                error.cause()
            ))),
        },
        MigrateError::VersionMismatch(version) => StoreError::Misconfigured(Cause::new(format!(
            "migration {version} was applied in another form than this version knows"
        ))),
        error => StoreError::Misconfigured(Cause::new(error.to_string())),
    }
}
