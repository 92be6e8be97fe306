//! Interrupt routes on a real VM. Without /dev/kvm it fails: there is no VM to route in.

use std::path::Path;

use arch::kvm::system::Host;
use arch::kvm::vm::{MsiMessage, Vm};

/// One line's bad message must neither count as routed later, nor stop the routes of other lines.
#[test]
fn a_message_that_the_kernel_refuses_spoils_no_other_route() {
    let kvm = Host::open(Path::new("/dev/kvm")).unwrap();
    let vm = Vm::create(&kvm, 0).unwrap();
    // With 32-bit APIC ids, bits 32 to 39 of an address are reserved.
    let bad = MsiMessage {
        address: 0x01_fee0_0000,
        data: 0x41,
    };
    let good = MsiMessage {
        address: 0xfee0_0000,
        data: 0x42,
    };
    for _ in 0..2 {
        assert!(vm.route(64, Some(bad)).is_err());
    }
    vm.route(65, Some(good)).unwrap();
    vm.route(64, Some(good)).unwrap();
}
