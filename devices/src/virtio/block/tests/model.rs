//! Random requests against a model.

use super::*;

/// One step of the model check.
#[derive(Clone, Debug)]
enum Op {
    Read(u64, usize),
    Write(u64, usize, u8),
    Discard(u64, u32),
    Zero(u64, u32, u32),
    Flush,
}

fn op() -> impl proptest::strategy::Strategy<Value = Op> {
    use proptest::prelude::*;
    prop_oneof![
        (0_u64..66, 1_usize..20).prop_map(|(s, n)| Op::Read(s, n)),
        (0_u64..66, 1_usize..20, any::<u8>()).prop_map(|(s, n, b)| Op::Write(s, n, b)),
        (0_u64..66, 0_u32..20).prop_map(|(s, n)| Op::Discard(s, n)),
        (0_u64..66, 0_u32..20, 0_u32..2).prop_map(|(s, n, f)| Op::Zero(s, n, f)),
        Just(Op::Flush),
    ]
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(24))]
    #[test]
    fn the_disk_behaves_like_a_vector_of_bytes(ops in proptest::collection::vec(op(), 1..40)) {
        const SECTORS: usize = 64;
        Rig::each(SECTORS * 512, |name, rig| {
            let mut model = pattern(SECTORS * 512);
            for op in &ops {
                let span = |sector: u64, count: usize| {
                    let start = sector as usize * 512;
                    let inside = count != 0 && sector as usize + count <= SECTORS;
                    inside.then_some(start..start + count * 512)
                };
                let (at, answer) = match *op {
                    Op::Read(s, n) => (span(s, n), rig.request(IN, s, &[], n * 512)),
                    Op::Write(s, n, b) => (span(s, n), rig.request(OUT, s, &vec![b; n * 512], 0)),
                    Op::Discard(s, n) => (span(s, n as usize), rig.request(DISCARD, 0, &range(s, n, 0), 0)),
                    Op::Zero(s, n, f) => (span(s, n as usize), rig.request(WRITE_ZEROES, 0, &range(s, n, f), 0)),
                    Op::Flush => (Some(0..0), rig.request(FLUSH, 0, &[], 0)),
                };
                assert_eq!(answer.0, u8::from(at.is_none()), "{name} {op:?}");
                let Some(at) = at else { continue };
                match *op {
                    Op::Read(..) => assert!(answer.2 == model[at], "{name} {op:?}"),
                    Op::Write(_, _, b) => model[at].fill(b),
                    Op::Discard(..) | Op::Zero(..) => model[at].fill(0),
                    Op::Flush => {}
                }
            }
            let mut all = vec![0; SECTORS * 512];
            rig.file.read_exact_at(&mut all, 0).unwrap();
            assert!(all == model, "{name}: the disk differs from the model");
        });
    }
}
