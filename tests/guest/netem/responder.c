/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The far end of reliable connections, in the kernel: takes requests of one packet in order and answers them at once, so
 * that a round trip is the wire's own. A process would add its waiting for a processor, which on an emulated one is
 * longer than what is to be measured. PIN_DIR comes from the command line.
 *
 * The frames: IPv4 without options, no VXLAN. A request to QP n is answered to QP n + RESPONSE_TO. */
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>

#define PORT_ROCE      4791
#define RC_SEND_ONLY   0x04
#define RC_ACKNOWLEDGE 0x11
#define ACK            0x1f /* AETH syndrome: ACK, credits not in use */
#define NAK_SEQUENCE   0x60
#define ASKS           0x80000000
#define PSN_MASK       0xffffff
#define PSN_HALF       0x800000
#define RESPONSE_TO    0x100
#define RESPONSE_BYTES 62 /* Ethernet, IPv4, UDP, BTH, AETH, ICRC (0: nobody looks at it) */

struct responder {
	__u32 expected; /* PSN */
	__u32 refused; /* 1: a NAK is out, and no other until `expected` comes (InfiniBand Architecture 1, 9.7.5.2.8) */
};

/* QP -> what it waits for. */
BPF_TABLE_PINNED("hash", __u32, struct responder, responders, 4096, PIN_DIR "/responders");

struct frame {
	__u8 to[6], from[6];
	__be16 type;
	__u8 version, tos;
	__be16 length, id, fragment;
	__u8 ttl, protocol;
	__be16 sum;
	__be32 source, destination;
	__be16 source_port, destination_port, udp_length, udp_sum;
	__u8 opcode, flags;
	__be16 partition;
	__be32 qp, psn, aeth;
} __attribute__((packed));

static __always_inline void turn(struct frame *frame)
{
	__u8 mac[6];
	__be32 address = frame->source;
	__u32 length = RESPONSE_BYTES - 14, sum;

	__builtin_memcpy(mac, frame->to, 6);
	__builtin_memcpy(frame->to, frame->from, 6);
	__builtin_memcpy(frame->from, mac, 6);
	frame->source = frame->destination;
	frame->destination = address;
	/* The header's sum changes by its length alone (RFC 1624). */
	sum = (__u16)~bpf_ntohs(frame->sum) + (__u16)~bpf_ntohs(frame->length) + length;
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	frame->sum = bpf_htons((__u16)~sum);
	frame->length = bpf_htons(length);
	frame->udp_length = bpf_htons(length - 20);
	frame->udp_sum = 0;
}

int respond(struct __sk_buff *skb)
{
	struct responder fresh = {}, *responder;
	__u32 qp, psn, ahead;
	struct frame frame;

	if (bpf_skb_load_bytes(skb, 0, &frame, sizeof(frame)) || frame.type != bpf_htons(0x0800) ||
	    frame.version != 0x45 || frame.protocol != 17 || frame.destination_port != bpf_htons(PORT_ROCE) ||
	    frame.opcode != RC_SEND_ONLY)
		return TC_ACT_UNSPEC;
	qp = bpf_ntohl(frame.qp) & PSN_MASK;
	psn = bpf_ntohl(frame.psn);
	fresh.expected = psn & PSN_MASK;
	responder = responders.lookup_or_try_init(&qp, &fresh);
	if (!responder)
		return TC_ACT_SHOT;
	ahead = (psn - responder->expected) & PSN_MASK;
	frame.aeth = bpf_htonl((__u32)ACK << 24);
	if (!ahead) {
		responder->expected = (responder->expected + 1) & PSN_MASK;
		responder->refused = 0;
	} else if (ahead < PSN_HALF) {
		if (responder->refused)
			return TC_ACT_SHOT;
		responder->refused = 1;
		psn = responder->expected | ASKS;
		frame.aeth = bpf_htonl((__u32)NAK_SEQUENCE << 24);
	} else {
		psn = ((responder->expected - 1) & PSN_MASK) | ASKS;
	}
	if (!(psn & ASKS))
		return TC_ACT_SHOT;
	frame.opcode = RC_ACKNOWLEDGE;
	frame.flags = 0;
	frame.qp = bpf_htonl(qp + RESPONSE_TO);
	frame.psn = bpf_htonl(psn & PSN_MASK);
	turn(&frame);
	if (bpf_skb_change_tail(skb, RESPONSE_BYTES, 0) || bpf_skb_store_bytes(skb, 0, &frame, sizeof(frame), 0))
		return TC_ACT_SHOT;
	return bpf_redirect(skb->ifindex, 0);
}
