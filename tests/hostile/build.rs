//! Passes the linker script and the flags for a flat, free-standing image.

fn main() {
    println!("cargo::rerun-if-changed=image.ld");
    let directory = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    let script = format!("-Wl,-T,{directory}/image.ld");
    for argument in [
        "-nostdlib",
        "-nostartfiles",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,norelro",
        "-Wl,-z,noexecstack",
        "-Wl,-n",
        &script,
    ] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}
