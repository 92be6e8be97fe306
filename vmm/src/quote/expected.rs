//! What the owner expects a quote to state.

use std::path::Path;

use serde::Deserialize;
use tdx::measure::Measurement;
use tdx::quote::Register;

use super::{Unreadable, Wishes};
use crate::evidence;

/// Everything that is compared.
#[derive(Debug, Default)]
pub(super) struct Expected {
    /// Values that a register may have; one that is not named is not compared.
    registers: Vec<(Register, Measurement)>,
    pub(super) report_data: Option<[u8; 64]>,
    pub(super) debug_allowed: bool,
}

/// A file that predicts no TDX guest.
#[derive(Debug, thiserror::Error)]
pub enum NoPrediction {
    /// No JSON of that form.
    #[error("{0}; give what cvmm measure --platform tdx --json printed")]
    Malformed(serde_json::Error),
    /// A value is no digest.
    #[error("{name} is not 96 hexadecimal digits; give what cvmm measure --platform tdx --json printed")]
    Digest {
        /// The field.
        name: &'static str,
    },
}

/// Longest prediction that is read; with every page explained it has some 100 KiB.
const MOST_BYTES: usize = 4 << 20;

/// The part of `cvmm measure --json` that a quote can be held against.
#[derive(Deserialize)]
struct Prediction {
    mrtd: String,
    /// Absent for a launch whose firmware measures what cvmm does not know.
    #[serde(default)]
    rtmrs: Option<[String; 4]>,
    #[serde(default)]
    mrconfigid: Option<String>,
    #[serde(default)]
    mrowner: Option<String>,
    #[serde(default)]
    mrownerconfig: Option<String>,
}

/// The registers that a prediction is about, beside MRTD. RTMR3 is the running guest's.
const PREDICTED: [Register; 3] = [Register::Rtmr0, Register::Rtmr1, Register::Rtmr2];

impl Prediction {
    fn registers(&self) -> Result<Vec<(Register, Measurement)>, NoPrediction> {
        let read = |(register, text): (Register, &String)| {
            let name = register.name();
            let value = text.parse().map_err(|_| NoPrediction::Digest { name })?;
            Ok((register, value))
        };
        let rtmrs = PREDICTED.into_iter().zip(self.rtmrs.iter().flatten());
        let launch = [(Register::Mrtd, &self.mrtd)].into_iter().chain(rtmrs).map(read);
        let owners = [
            (Register::MrConfigId, &self.mrconfigid),
            (Register::MrOwner, &self.mrowner),
            (Register::MrOwnerConfig, &self.mrownerconfig),
        ];
        let owners = owners
            .into_iter()
            .filter_map(|(register, text)| Some((register, text.as_ref()?)));
        let mut owners = owners.map(read).collect::<Result<Vec<_>, _>>()?;
        // Zeros are what measure prints of a field that it was not given.
        owners.retain(|(_, value)| *value != Measurement::ZERO);
        launch.chain(owners.into_iter().map(Ok)).collect()
    }
}

fn prediction(path: &Path) -> Result<Vec<(Register, Measurement)>, Unreadable> {
    let json = evidence::file("measure-json", path, MOST_BYTES)?;
    let prediction: Prediction = serde_json::from_slice(&json).map_err(NoPrediction::Malformed)?;
    Ok(prediction.registers()?)
}

impl Expected {
    pub(super) fn of(wishes: &Wishes) -> Result<Self, Unreadable> {
        let mut registers = match &wishes.measure_json {
            Some(path) => prediction(path)?,
            None => Vec::new(),
        };
        let single = [
            (Register::Rtmr0, wishes.rtmr0),
            (Register::Rtmr1, wishes.rtmr1),
            (Register::Rtmr2, wishes.rtmr2),
            (Register::Rtmr3, wishes.rtmr3),
            (Register::MrConfigId, wishes.mrconfigid),
            (Register::MrOwner, wishes.mrowner),
            (Register::MrOwnerConfig, wishes.mrownerconfig),
        ];
        // A flag is more particular than the file.
        for (register, value) in single {
            if let Some(value) = value {
                registers.retain(|(other, _)| *other != register);
                registers.push((register, value));
            }
        }
        if !wishes.mrtd.is_empty() {
            registers.retain(|(other, _)| *other != Register::Mrtd);
        }
        registers.extend(wishes.mrtd.iter().map(|value| (Register::Mrtd, *value)));
        registers.extend(wishes.mrseam.iter().map(|value| (Register::MrSeam, *value)));
        Ok(Self {
            registers,
            report_data: wishes.report_data,
            debug_allowed: wishes.allow_debug,
        })
    }

    /// The values that `register` may have; empty means any.
    pub(super) fn register(&self, register: Register) -> Vec<Measurement> {
        let of = self.registers.iter().filter(|(other, _)| *other == register);
        of.map(|(_, value)| *value).collect()
    }
}
