//! Patch levels as one word: `boot-loader=4,snp=24`.

use std::str::FromStr;

use snp::report::TcbMinimum;

/// Lowest patch levels; those that are not named are 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Levels(pub TcbMinimum);

/// Text that names no patch levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "not patch levels; write for example boot-loader=4,tee=0,snp=24,microcode=219 (and fmc=N since Turin)"
)]
pub struct NoLevels;

impl FromStr for Levels {
    type Err = NoLevels;

    fn from_str(text: &str) -> Result<Self, NoLevels> {
        let mut levels = TcbMinimum::default();
        for part in text.split(',') {
            let (name, value) = part.split_once('=').ok_or(NoLevels)?;
            let value = value.parse().map_err(|_| NoLevels)?;
            match name {
                "boot-loader" => levels.boot_loader = value,
                "tee" => levels.tee = value,
                "snp" => levels.snp = value,
                "microcode" => levels.microcode = value,
                "fmc" => levels.fmc = Some(value),
                _ => return Err(NoLevels),
            }
        }
        Ok(Self(levels))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_named_and_fit_a_byte() {
        let expected = TcbMinimum {
            fmc: Some(1),
            boot_loader: 4,
            tee: 0,
            snp: 24,
            microcode: 219,
        };
        assert_eq!(
            "snp=24,boot-loader=4,microcode=219,fmc=1".parse(),
            Ok(Levels(expected))
        );
        for bad in ["", "4", "snp", "snp=", "snp=256", "snp=-1", "spl=3", "snp=1,"] {
            assert_eq!(bad.parse::<Levels>(), Err(NoLevels), "{bad}");
        }
    }
}
