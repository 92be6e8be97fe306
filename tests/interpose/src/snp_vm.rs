//! `KVM_MEMORY_ENCRYPT_OP` of an SNP guest, between the program's memory and the model.

use snp::commands::{Identity, SevCommands};
use snp::id_block::{IdAuth, IdBlock};
use snp::model::{Model, RawInit, RawUpdate};

use crate::call::Call;
use crate::tdx_vm::place;
use crate::vm::Vm;

/// Firmware's answer to an ID block that it cannot read.
const INVALID_PARAM: u32 = 0x16;
/// Page types.
const ZERO: u8 = 3;
const SECRETS: u8 = 5;

/// A command; what it was, and the errno.
pub(crate) fn on_vm(model: &mut Model, vm: &Vm, call: &Call<'_>) -> (String, Result<(), i32>) {
    let at = call.args()[2];
    if at == 0 {
        return ("probe".into(), model.probe());
    }
    let (Ok(id), Ok(data)) = (call.u32(at), call.u64(at + 8)) else {
        return ("?".into(), Err(libc::EFAULT));
    };
    let fault = |errno| (errno, 0);
    let (name, answer) = match id {
        22 => ("INIT2".to_owned(), init2(model, call, data)),
        100 => start(model, call, data),
        101 => update(model, vm, call, data),
        102 => {
            let read = identity(call, data).map_err(fault);
            let answer = read.and_then(|(identity, flags)| model.raw_finish(&identity, flags));
            ("SNP_LAUNCH_FINISH".into(), answer)
        }
        103 => {
            let answer = model.enable_req_certs().map_err(|refusal| fault(refusal.errno()));
            ("SNP_ENABLE_REQ_CERTS".into(), answer)
        }
        other => (format!("command {other}"), Err(fault(libc::EINVAL))),
    };
    let status = answer.err().map_or(0, |(_, status)| status);
    let written = if status == 0 {
        Ok(())
    } else {
        call.write(at + 16, &status.to_ne_bytes())
    };
    (name, answer.map_err(|(errno, _)| errno).and(written))
}

fn init2(model: &mut Model, call: &Call<'_>, data: u64) -> Result<(), (i32, u32)> {
    let raw: [u8; 16] = call.bytes(data).map_err(|errno| (errno, 0))?;
    let [.., a, b, _, _] = raw;
    model.raw_init2(RawInit {
        vmsa_features: u64::from_ne_bytes(raw[..8].try_into().expect("eight bytes")),
        flags: u32::from_ne_bytes(raw[8..12].try_into().expect("four bytes")),
        ghcb_version: u16::from_ne_bytes([a, b]),
    })
}

fn start(model: &mut Model, call: &Call<'_>, data: u64) -> (String, Result<(), (i32, u32)>) {
    let (Ok(policy), Ok(flags)) = (call.u64(data), call.bytes(data + 24)) else {
        return ("SNP_LAUNCH_START".into(), Err((libc::EFAULT, 0)));
    };
    let answer = model.raw_start(policy, u16::from_ne_bytes(flags));
    (format!("SNP_LAUNCH_START policy {policy:#x}"), answer)
}

fn update(model: &mut Model, vm: &Vm, call: &Call<'_>, data: u64) -> (String, Result<(), (i32, u32)>) {
    let fields = [0, 8, 16].map(|at| call.u64(data + at));
    let ([Ok(gfn_start), Ok(uaddr), Ok(len)], Ok([kind, _, low, high])) = (fields, call.bytes(data + 24))
    else {
        return ("SNP_LAUNCH_UPDATE".into(), Err((libc::EFAULT, 0)));
    };
    let name = format!(
        "SNP_LAUNCH_UPDATE {:#x} pages {} type {kind}",
        gfn_start << 12,
        len >> 12
    );
    let bytes = usize::try_from(len).unwrap_or(usize::MAX).min(256 << 20);
    let sent = if kind == ZERO {
        vec![0; bytes]
    } else {
        call.vector(uaddr, bytes)
    };
    let mut source = sent.clone();
    let mut raw = RawUpdate {
        gfn_start,
        uaddr,
        len,
        kind,
        flags: u16::from_ne_bytes([low, high]),
        source: (!source.is_empty()).then_some(source.as_mut_slice()),
        writable: true,
    };
    let answer = model.raw_update(&mut raw);
    let after = [raw.gfn_start, raw.uaddr, raw.len].map(u64::to_ne_bytes).concat();
    let done = gfn_start << 12..raw.gfn_start << 12;
    let copied_back = source != sent;
    if kind == SECRETS {
        // Firmware's keys; any bytes will do for a guest that gets no reports.
        source.fill(0x5e);
    }
    let written = call.write(data, &after).and_then(|()| {
        if copied_back && answer.is_err() {
            call.write(uaddr, &source)?;
        }
        place(vm, call, done, &source)
    });
    (name, answer.and(written.map_err(|errno| (errno, 0))))
}

/// `struct kvm_sev_snp_launch_finish`, and its flags.
fn identity(call: &Call<'_>, data: u64) -> Result<(Identity, u16), i32> {
    let raw: [u8; 56] = call.bytes(data)?;
    let [block_at, auth_at] =
        [0, 8].map(|at| u64::from_ne_bytes(raw[at..at + 8].try_into().expect("eight bytes")));
    let mut identity = Identity {
        host_data: raw[19..51].try_into().expect("32 bytes"),
        vcek_disabled: raw[18] != 0,
        ..Identity::default()
    };
    if raw[16] != 0 {
        if block_at == 0 || auth_at == 0 {
            return Err(libc::EINVAL);
        }
        let block = IdBlock::parse(&call.bytes::<96>(block_at)?);
        let auth = IdAuth::parse(&call.bytes::<4096>(auth_at)?);
        if let (Ok(block), Ok(auth)) = (block, auth) {
            identity.id_block = Some((block, auth));
        } else {
            call.write(call.args()[2] + 16, &INVALID_PARAM.to_ne_bytes())?;
            return Err(libc::EIO);
        }
    }
    Ok((identity, u16::from_ne_bytes([raw[54], raw[55]])))
}
