//! The memory functions that the compiler calls. Also part of `tests/hostile`.
// UNSAFETY: the C memory functions.
#![expect(unsafe_code, reason = "the memory functions of the C ABI")]

use core::arch::asm;

/// C `memcpy`.
///
/// # Safety
/// As in C: `to` and `from` are valid for `len` bytes and do not overlap.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller promises both ranges; the string instruction touches exactly `len` bytes.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") len => _,
            options(nostack, preserves_flags));
    }
    to
}

/// C `memmove`.
///
/// # Safety
/// As in C: `to` and `from` are valid for `len` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= len {
        // SAFETY: a forward copy never overwrites what it has yet to read, as `to` is not inside `from`.
        return unsafe { memcpy(to, from, len) };
    }
    // SAFETY: the caller promises both ranges; the copy runs backwards from their last bytes.
    unsafe {
        asm!("std", "rep movsb", "cld",
            inout("rdi") to.wrapping_add(len).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(len).wrapping_sub(1) => _,
            inout("rcx") len => _, options(nostack));
    }
    to
}

/// C `memset`.
///
/// # Safety
/// As in C: `to` is valid for `len` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller promises the range; the string instruction touches exactly `len` bytes.
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, inout("rcx") len => _, in("al") byte.to_le_bytes()[0],
            options(nostack, preserves_flags));
    }
    to
}

/// C `memcmp`.
///
/// # Safety
/// As in C: `a` and `b` are valid for `len` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    for at in 0..len {
        // SAFETY: `at` is below `len`, for which the caller promises `a`.
        let left = unsafe { a.wrapping_add(at).read_volatile() };
        // SAFETY: `at` is below `len`, for which the caller promises `b`.
        let right = unsafe { b.wrapping_add(at).read_volatile() };
        if left != right {
            return i32::from(left).wrapping_sub(right.into());
        }
    }
    0
}

/// C `bcmp`.
///
/// # Safety
/// As [`memcmp`].
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    // SAFETY: the caller's promise is the same.
    unsafe { memcmp(a, b, len) }
}
