//! Rate limits of disks and network cards.

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};

use super::text::{BadValue, Size, bad, number};

/// Most per second that a device does in one direction, after a burst of one second's worth.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct Rates {
    /// Bytes per second, not zero; absent is no limit.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "not_zero")]
    pub bandwidth: Option<Size>,
    /// Requests or frames per second, not zero; absent is no limit.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "not_zero")]
    pub operations: Option<u64>,
}

const ZERO: &str = "a rate of 0 would stop the device; leave it out for no limit";

/// Refuses a device that could never do anything.
fn not_zero<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default + PartialEq>(
    from: D,
) -> Result<Option<T>, D::Error> {
    let value = Option::<T>::deserialize(from)?;
    if value == Some(T::default()) {
        return Err(D::Error::custom(ZERO));
    }
    Ok(value)
}

impl Rates {
    /// True if nothing is limited.
    pub fn are_unlimited(&self) -> bool {
        *self == Self::default()
    }

    /// Takes `bandwidth=SIZE` or `operations=N`, as `name` and `value`; false if it is neither.
    pub(super) fn take(&mut self, name: &str, value: &str) -> Result<bool, BadValue> {
        match name {
            "bandwidth" => self.bandwidth = Some(value.parse()?),
            "operations" => self.operations = Some(number(name, value)?),
            _ => return Ok(false),
        }
        if self.bandwidth == Some(Size(0)) || self.operations == Some(0) {
            return bad(ZERO);
        }
        Ok(true)
    }
}

impl From<Rates> for devices::virtio::rate::Rates {
    fn from(rates: Rates) -> Self {
        Self {
            bytes: rates.bandwidth.map(|size| size.0),
            operations: rates.operations,
        }
    }
}
