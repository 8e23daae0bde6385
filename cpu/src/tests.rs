use super::*;

/// A CPU that nobody makes, with what matters here.
const TEXT: &str = "tsc=2400000 0:d,756e6547,6c65746e,49656e69 1:806e8,800,80982201,781fbff 7.0:1,1807ab,0,0 \
    d.0:7,0,340,0 d.1:1,0,0,0 d.2:100,240,0,0 40000000:40000001,4b4d564b,564b4d56,4d 40000001:1000009,0,0,0 \
    80000000:80000008,0,0,0 80000001:0,0,1,2c100800 80000008:3028,0,0,0";

fn host() -> CpuBaseline {
    CpuBaseline::from_text(TEXT).expect("a baseline")
}

fn leaf_of(baseline: &mut CpuBaseline, leaf: u32, subleaf: u32) -> &mut CpuidLeaf {
    let mut leaves = baseline.leaves.iter_mut();
    leaves
        .find(|entry| (entry.leaf, entry.subleaf) == (leaf, subleaf))
        .expect("leaf")
}

fn without(baseline: &CpuBaseline, leaf: u32, register: Register, bit: u32) -> CpuBaseline {
    let mut less = baseline.clone();
    let registers = &mut leaf_of(&mut less, leaf, 0).registers;
    assert_ne!(registers[register as usize] & (1 << bit), 0, "has no such feature");
    registers[register as usize] &= !(1 << bit);
    less
}

#[test]
fn a_host_provides_its_own_baseline() {
    let host = host();
    assert_eq!(host.check(&host, false), Ok(()));
    assert_eq!(host.intersect(&host).as_ref(), Ok(&host));
    assert_eq!(host.vendor(), "GenuineIntel");
    assert_eq!(host.to_text(), TEXT);
}

/// What a seat offers on its host, and what of a guest's CPU it can't give: by its name, before anything is copied.
#[test]
fn what_a_seat_cant_give_is_named() {
    let host = host();
    let offer = CpuOffer {
        host: host.clone(),
        machine: host.clone(),
        tsc_scaling: false,
    };
    assert_eq!(offer.check(&host), Ok(()));

    let mut more = host.clone();
    leaf_of(&mut more, 7, 0).registers[2] |= 1 << 8;
    let refused = offer.check(&more).expect_err("the host has no such feature");
    let feature = "gfni (CPUID leaf 0x7.0 Ecx bit 8)".to_owned();
    assert_eq!(refused, CpuError::Feature { feature });
    assert!(refused.to_string().contains("gfni"), "{refused}");

    // The host has it, but one of the machines was made without it.
    let less = without(&host, 7, Register::Ebx, 5);
    let feature = "avx2 (CPUID leaf 0x7.0 Ebx bit 5)".to_owned();
    let reduced = CpuOffer {
        machine: less.clone(),
        ..offer.clone()
    };
    assert_eq!(
        reduced.check(&host),
        Err(CpuError::NotGiven {
            feature: feature.clone()
        })
    );
    assert_eq!(offer.check(&less), Err(CpuError::Beyond { feature }));

    let mut faster = host.clone();
    faster.tsc_khz = host.tsc_khz / 1000 * 1001;
    assert!(matches!(offer.check(&faster), Err(CpuError::TscFrequency { .. })));
    let scaling = CpuOffer {
        tsc_scaling: true,
        ..offer.clone()
    };
    assert_eq!(scaling.check(&faster), Ok(()));

    let mut model = host.clone();
    leaf_of(&mut model, 1, 0).registers[0] ^= 0x10;
    assert!(matches!(offer.check(&model), Err(CpuError::Leaf { leaf: 1, .. })));
    model.leaves = vec![model.leaves[0]; 5000];
    assert!(matches!(offer.check(&model), Err(CpuError::TooLarge { leaves: 5000 })));
}

#[test]
fn a_feature_that_one_host_lacks_is_named_and_left_out_of_the_intersection() {
    let rich = host();
    let poor = without(&rich, 7, Register::Ebx, 5);
    let feature = "avx2 (CPUID leaf 0x7.0 Ebx bit 5)".to_owned();
    assert_eq!(rich.check(&poor, false), Err(CpuError::Feature { feature }));
    assert_eq!(poor.check(&rich, false), Ok(()));
    for (one, other) in [(&rich, &poor), (&poor, &rich)] {
        let common = one.intersect(other).expect("alike");
        assert_eq!(common, poor);
        assert_eq!(common.check(&rich, false), Ok(()));
        assert_eq!(common.check(&poor, false), Ok(()));
        assert_eq!(CpuBaseline::from_text(&common.to_text()), Ok(common));
    }
}

#[test]
fn other_vendor_other_clock_and_absurd_baselines_are_refused() {
    let host = host();
    let mut other = host.clone();
    leaf_of(&mut other, 0, 0).registers[1] ^= 1;
    assert!(matches!(host.check(&other, false), Err(CpuError::Vendor { .. })));
    assert!(host.intersect(&other).is_err());
    let mut layout = host.clone();
    leaf_of(&mut layout, 0xD, 2).registers[1] = 0x200;
    assert!(matches!(host.check(&layout, false), Err(CpuError::Layout { .. })));
    let mut narrow = host.clone();
    leaf_of(&mut narrow, 0x8000_0008, 0).registers[0] = 0x3024;
    assert!(matches!(host.check(&narrow, false), Err(CpuError::Layout { .. })));
    assert_eq!(host.intersect(&narrow).expect("alike").physical_address_bits(), 0x24);
    let mut fast = host.clone();
    fast.tsc_khz += fast.tsc_khz / 1000;
    assert!(matches!(fast.check(&host, false), Err(CpuError::TscFrequency { .. })));
    assert_eq!(fast.check(&host, true), Ok(()));
    fast.tsc_khz = host.tsc_khz + host.tsc_khz / 5000;
    assert_eq!(fast.check(&host, false), Ok(()));
    let mut absurd = host.clone();
    absurd.leaves = vec![host.leaves[0]; 1000];
    assert!(matches!(absurd.check(&host, false), Err(CpuError::TooLarge { .. })));
}

#[test]
fn texts_of_others_are_bounded_and_checked() {
    let beyond = |text: String| matches!(CpuBaseline::from_text(&text), Err(TextError::Beyond { .. }));
    let malformed = |text: String| matches!(CpuBaseline::from_text(&text), Err(TextError::Malformed { .. }));
    for text in [
        "",
        "tsc=",
        "tsc=0",
        "tsc=-1",
        "tsc=5000000000",
        "TSC=1",
        "0:0,0,0,0",
        "tsc=1  0:0,0,0,0",
        "tsc=1 0:0,0,0",
        "tsc=1 0:0,0,0,0,0",
        "tsc=1 0:0,0,0,+1",
        "tsc=1 0:0,0,0,100000000",
        "tsc=1 0:0,0,0,00",
        "tsc=1 .:0,0,0,0",
        "tsc=1 7.:0,0,0,0",
        "tsc=1 0:0,0,0,é",
    ] {
        assert!(malformed(text.to_owned()), "{text}");
    }
    // SVM, a leaf that is left out, a leaf twice, leaves out of order, more leaves than there are.
    assert!(beyond(TEXT.replace("80000001:0,0,1,", "80000001:0,0,5,")));
    assert!(beyond(TEXT.replace(" 40000000:", " b.0:0,0,0,0 40000000:")));
    assert!(beyond(TEXT.replace(" 7.0:", " 1:806e8,800,80982201,781fbff 7.0:")));
    assert!(beyond(TEXT.replace(" 1:", " 7.1:0,0,0,0 1:")));
    assert!(beyond(format!("tsc=1{}", " 0:0,0,0,0".repeat(MAX_LEAVES + 1))));
    // Without SSE2.
    let lacks = CpuBaseline::from_text(&TEXT.replace("781fbff", "381fbff"));
    let feature = "sse2 (CPUID leaf 0x1.0 Edx bit 26)".to_owned();
    assert_eq!(lacks, Err(TextError::Lacks { feature }));
    assert!(matches!(CpuBaseline::from_text("tsc=1"), Err(TextError::Lacks { .. })));
    let long = "tsc=1 ".repeat(TEXT_BYTES_MAX);
    assert!(matches!(CpuBaseline::from_text(&long), Err(TextError::TooLong { .. })));
    // Every beginning and every change of a letter is refused or read as what it is; nothing panics.
    for end in 0..TEXT.len() {
        if let Ok(read) = CpuBaseline::from_text(&TEXT[..end]) {
            assert_eq!(read.to_text(), TEXT[..end]);
        }
        for letter in ["0", "f", " ", ":", "."] {
            let changed = format!("{}{letter}{}", &TEXT[..end], &TEXT[end + 1..]);
            if let Ok(read) = CpuBaseline::from_text(&changed) {
                assert_eq!(read.to_text(), changed);
            }
        }
    }
}
