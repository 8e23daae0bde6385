# Entry, mode switches, interrupt entry: all that runs in ring 0.
#
# Nothing here touches SSE registers, so that interrupts need not save them, and everything is short: ring 0 may be
# interpreted by the hypervisor, ring 3 never is.

# Offsets in cpu::PerCpu, checked there.
.set PERCPU_WAKE, 0
.set PERCPU_INDEX, 8
.set PERCPU_KERNEL_STACK, 16
.set PERCPU_USER_STACK, 24
.set PERCPU_TSS, 64
.set PERCPU_BYTES, 256            # the I/O bitmap follows the last one

.set KERNEL_CODE, 0x08
.set KERNEL_DATA, 0x10
.set KERNEL_CODE32, 0x18
.set USER_DATA, 0x20 + 3
.set USER_CODE, 0x28 + 3
.set FIRST_TSS, 0x30

.set TRAMPOLINE, 0x8000
.set MAX_VCPUS, 16

# ---- The note by which a loader finds the 32-bit entry (XEN_ELFNOTE_PHYS32_ENTRY).
.section .note.Xen, "a", @note
.align 4
    .long 4
    .long 8
    .long 18
    .asciz "Xen"
    .quad pvh_start

# ---- Entry of the first vCPU: 32-bit protected mode, flat segments, no paging, hvm_start_info in EBX.
.section .text.boot, "ax"
.code32
.global pvh_start
pvh_start:
    cli
    cld
    mov dword ptr [start_info_address], ebx
    lgdt [gdt_pointer]
    mov edi, offset PERCPU
    mov esi, offset guest_main
    jmp enter_long_mode

# Entry of the others, from the trampoline.
application_protected:
    mov edi, dword ptr [application_percpu]
    mov esi, offset application_main

# EDI: PerCpu. ESI: where to go on in ring 3. The upper halves of both are zero from here on.
enter_long_mode:
    mov ax, KERNEL_DATA
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov eax, cr4
    or eax, 0x620                   # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xC0000080             # EFER
    rdmsr
    or eax, 0x100                   # LME
    wrmsr
    mov eax, cr0
    and eax, 0x9FFFFFF3             # not: CD, NW, EM, TS
    or eax, 0x80000023              # PG, NE, MP, PE
    mov cr0, eax
    ljmp KERNEL_CODE, offset long_mode

.code64
long_mode:
    mov ax, USER_DATA
    mov fs, ax
    mov gs, ax
    mov edi, edi
    mov esi, esi
    mov rsp, [rdi + PERCPU_KERNEL_STACK]

    cmp qword ptr [rdi + PERCPU_INDEX], 0
    jne 1f
    call build_idt
    mov al, 0xFF                    # firmware may have left the 8259s open, at the vectors of exceptions
    out 0x21, al
    out 0xA1, al
1:
    lidt [idt_pointer]

    # The TSS: the ring 0 stack, and the bitmap that opens every port to ring 3 (where a hypervisor drops IOPL 3).
    mov [rdi + PERCPU_TSS + 4], rsp
    lea rax, [rdi + PERCPU_TSS]
    mov ecx, offset PERCPU + PERCPU_BYTES * MAX_VCPUS
    sub ecx, eax
    mov word ptr [rdi + PERCPU_TSS + 102], cx
    add ecx, 8192                   # the segment ends with the bitmap's closing byte
    mov rbx, [rdi + PERCPU_INDEX]
    shl rbx, 4
    add rbx, FIRST_TSS
    mov word ptr [gdt + rbx], cx
    mov word ptr [gdt + rbx + 2], ax
    mov rcx, rax
    shr rcx, 16
    mov byte ptr [gdt + rbx + 4], cl
    mov byte ptr [gdt + rbx + 5], 0x89
    mov byte ptr [gdt + rbx + 6], 0
    mov byte ptr [gdt + rbx + 7], ch
    shr rax, 32
    mov qword ptr [gdt + rbx + 8], rax
    ltr bx

    # GS base: ring 3 never changes it, so interrupt entry needs no swapgs.
    mov ecx, 0xC0000101
    mov eax, edi
    xor edx, edx
    wrmsr

    push USER_DATA
    push qword ptr [rdi + PERCPU_USER_STACK]
    push 0x3202                     # IOPL 3, IF
    push USER_CODE
    push rsi
    iretq

# Exceptions, then one handler for every device, timer and IPI vector, then the spurious vector.
build_idt:
    lea rbx, [idt]
    lea rax, [exception_stubs]
    mov ecx, 32
1:  mov edx, 0x8E
    call set_gate
    add rax, 16
    dec ecx
    jnz 1b
    lea rax, [interrupt]
    mov ecx, 16
2:  mov edx, 0x8E
    call set_gate
    dec ecx
    jnz 2b
    lea rbx, [idt + 13 * 16]
    lea rax, [general_protection]
    mov edx, 0x8E
    call set_gate
    lea rbx, [idt + 0xFF * 16]
    lea rax, [spurious]
    mov edx, 0x8E
    call set_gate
    ret

# RAX: handler below 4 GiB. EDX: type. RBX: IDT entry, moved on.
set_gate:
    mov word ptr [rbx], ax
    mov word ptr [rbx + 2], KERNEL_CODE
    mov byte ptr [rbx + 4], 0
    mov byte ptr [rbx + 5], dl
    mov rdx, rax
    shr rdx, 16
    mov word ptr [rbx + 6], dx
    mov qword ptr [rbx + 8], 0
    add rbx, 16
    ret

# Every interrupt only sets the vCPU's wake word; ring 3 looks for the reason.
.align 16
interrupt:
    mov byte ptr gs:[PERCPU_WAKE], 1
    push rax
    mov eax, 0xFEE000B0             # the local APIC's end of interrupt
    mov dword ptr [rax], 0
    pop rax
spurious:
    iretq

# Ring 3 asks ring 0 by HLT, which it may not execute: RAX 0 waits for an interrupt, unless one came since ring 3
# cleared the wake word; 1 reads MSR RCX into RAX, and RDX is lost; 2 stops this vCPU for good. (Exceptions enter ring 0
# on any hypervisor; INT n and SYSCALL do not on one that runs ring 3 natively and interprets ring 0.)
.align 16
general_protection:
    push rcx
    mov rcx, [rsp + 16]             # RIP
    cmp byte ptr [rcx], 0xF4        # HLT
    pop rcx
    jne 4f
    add rsp, 8                      # the error code
    inc qword ptr [rsp]             # go on after the HLT
    test rax, rax
    jnz 2f
    cmp byte ptr gs:[PERCPU_WAKE], 0
    jne 1f
    sti
    hlt
    cli
1:  iretq
2:  cmp rax, 1
    jne 3f
    rdmsr
    shl rdx, 32
    or rax, rdx
    iretq
3:  cli
    hlt
    jmp 3b
4:  push 13
    jmp exception

# Exceptions end in ring 3, where exception_main reports them.
.align 16
exception_stubs:
.set vector, 0
.rept 32
    .align 16
    .if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21)
    nop
    nop
    .else
    push 0
    .endif
    push vector
    jmp exception
    .set vector, vector + 1
.endr

.align 16
exception:
    pop qword ptr [exception_info]              # vector
    pop qword ptr [exception_info + 8]          # error code
    pop qword ptr [exception_info + 16]         # RIP
    pop qword ptr [exception_info + 24]         # CS
    pop qword ptr [exception_info + 32]         # RFLAGS
    pop qword ptr [exception_info + 40]         # RSP
    pop qword ptr [exception_info + 48]         # SS
    mov rax, cr2
    mov [exception_info + 56], rax
    mov rax, gs:[PERCPU_INDEX]
    mov [exception_info + 64], rax
    mov rsp, gs:[PERCPU_KERNEL_STACK]
    push USER_DATA
    push qword ptr gs:[PERCPU_USER_STACK]
    push 0x3002                                 # IOPL 3, no interrupts
    push USER_CODE
    push offset exception_main
    iretq

# ---- Copied to TRAMPOLINE: where the start-up IPI begins, in real mode.
.code16
.align 16
.global trampoline_start
.global trampoline_end
trampoline_start:
    jmp 1f
.align 8                                        # TRAMPOLINE + 8
    .word gdt_end - gdt - 1
    .long gdt
1:  cli
    cld
    xor ax, ax
    mov ds, ax
    .byte 0x66                                  # 32-bit base
    lgdt [TRAMPOLINE + 8]
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xEA                            # ljmp to a 32-bit offset
    .long application_segments
    .word KERNEL_CODE32
trampoline_end:

.code32
application_segments:
    mov ax, KERNEL_DATA
    mov ds, ax
    jmp application_protected

# ---- Tables
.code64
.section .data.boot, "aw"
.align 16
gdt:
    .quad 0
    .quad 0x00209A0000000000        # 0x08 ring 0 code
    .quad 0x00CF92000000FFFF        # 0x10 ring 0 data
    .quad 0x00CF9A000000FFFF        # 0x18 ring 0 code, 32 bits
    .quad 0x00CFF2000000FFFF        # 0x20 ring 3 data
    .quad 0x0020FA0000000000        # 0x28 ring 3 code
    .fill MAX_VCPUS * 2, 8, 0       # 0x30 task state segments
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
.align 8
idt_pointer:
    .word 256 * 16 - 1
    .quad idt

# The first 4 GiB, one to one, in pages of 2 MiB, open to ring 3. memory.rs adds what lies above.
.align 4096
.global pml4
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
.global pdpt
pdpt:
    .quad pd + 7
    .quad pd + 0x1000 + 7
    .quad pd + 0x2000 + 7
    .quad pd + 0x3000 + 7
    .fill 508, 8, 0
pd:
.set page, 0
.rept 2038
    .quad page * 0x200000 + 0x87
    .set page, page + 1
.endr
.rept 10                            # from 0xFEC00000: I/O APIC and local APIC, not cached
    .quad page * 0x200000 + 0x97
    .set page, page + 1
.endr

.section .bss.boot, "aw", @nobits
.align 16
idt:
    .skip 256 * 16
.global exception_info
exception_info:
    .skip 9 * 8
.global start_info_address
start_info_address:
    .skip 8
.global application_percpu
application_percpu:
    .skip 8
