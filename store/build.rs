//! Migrations are compiled in; a new file among them must not be missed.

fn main() {
    println!("cargo:rerun-if-changed=../migrations");
}
