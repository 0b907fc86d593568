-- Event types: every type that this version emits. A payment, a refund or a dispute that enters a state or a status has
-- the event of that name; the others stand here.

insert into outbox.event_types (type, is_for_merchants, meaning)
select
    'payment.' || states.state,
    true,
    'The payment entered the state ' || states.state || ': ' || states.meaning || '.'
from surety.states
union all
select
    'refund.' || refund_states.state,
    true,
    'The refund entered the state ' || refund_states.state || ': ' || refund_states.meaning || '.'
from surety.refund_states
union all
select
    'dispute.' || dispute_statuses.status,
    true,
    'The dispute has the status ' || dispute_statuses.status || ': ' || dispute_statuses.meaning || '.'
from surety.dispute_statuses
union all
select
    listed.type,
    listed.is_for_merchants,
    listed.meaning
from (
    values
    ('payment.held', true, 'The payment is on hold: it waits for a review, and nothing was sent.'),
    ('payment.released', true, 'The payment on hold was released: it is sent to the provider.'),
    ('payment.capture_requested', false, 'The merchant asked to capture an authorized payment.'),
    ('payment.cancel_requested', false, 'The merchant asked to cancel a payment that the provider holds.'),
    ('payment.attempt_failed', false, 'The payer''s attempt was declined; the payment can be canceled.'),
    ('payment.action_overdue', false, 'The payer did not act in time, or an operator discarded the dead letter.'),
    ('payment.authorized_late', false, 'The provider still holds an object of a payment that has ended here.'),
    ('payment.money_available', false, 'The money of a payment with a loss has arrived: its settlement is met.'),
    ('payment.orphan_found', false, 'The provider has a second object for a payment.'),
    ('payment.fraud_warning', true, 'The card''s issuer suspects fraud, or the warning can no more be acted on.'),
    ('customer.created', true, 'The merchant created a customer.'),
    ('customer.updated', true, 'A customer was changed.'),
    ('customer.out_of_date', false, 'The provider has not got the customer''s present data.'),
    ('customer.payment_method_saved', true, 'A payment method of the customer was saved.'),
    ('customer.payment_method_detached', true, 'A saved payment method of the customer was removed.'),
    ('customer.payment_method_updated', true, 'The card network replaced the card of a saved payment method.'),
    ('payment.client_secret_requested', false, 'The merchant asked for the client secret of a payment.'),
    ('payment.method_usable', false, 'The payment has proved a payment method that is to be saved.'),
    ('dispute.evidence_given', false, 'The merchant asked to submit evidence.'),
    ('dispute.evidence_due', true, 'Evidence is due soon and was not submitted.'),
    ('dispute.evidence_refused', true, 'The evidence was not taken, for `evidence.failure`; it is open again.'),
    ('merchant_payout.asked', true, 'A payout to the merchant was made: its amount is reserved.'),
    ('merchant_payout.left', true, 'A payout to the merchant left: its transfer was made.'),
    ('merchant_payout.returned', true, 'A payout to the merchant came back; its amount is available again.'),
    ('merchant_payout.canceled', true, 'A payout to the merchant was canceled before it left.'),
    ('webhook.received', false, 'An event of the provider was stored, from a webhook or from its list.')
) as listed (type, is_for_merchants, meaning)
on conflict (type) do update
set is_for_merchants = excluded.is_for_merchants, meaning = excluded.meaning
where (event_types.is_for_merchants, event_types.meaning) <> (excluded.is_for_merchants, excluded.meaning);
