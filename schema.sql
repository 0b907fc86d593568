-- Surety's state: schemas, types, tables, constraints, indexes, rows of rules, roles. Functions, triggers and views are
-- in db/sql/.
--
-- The sections, in their order:
--
--   roles            who owns the schemas, which roles connect; their rights are in db/sql/operations/grants.sql
--   environment      the identity of this database, and the clock that only a test database can move
--   rules            currencies, states, transitions, mandatory steps, kinds of facts: rows, not code
--   merchants        merchants, their API keys
--   operators        accounts of operators, their roles and keys
--   rate limits      requests per second of keys and merchants, and how much of it they have used
--   customers        merchants' customers, their saved payment methods and bank accounts, our calls about them
--   requests         idempotency keys and references in use: unique over all months, hence narrow and unpartitioned
--   payments         payments, their steps, requests for client secrets, our calls to providers, circuits of accounts
--   limits           money limits and their counters, velocity rules, payments on hold
--   refunds          refunds and their steps
--   disputes         disputes as last fetched, with the merchant's evidence
--   facts            stored provider events, the facts read from them, and facts without a payment
--   payouts          what the provider pays out to our bank, and the balance transactions in each payout
--   bank statements  imported files, accounts and statements of banks, their lines and the payouts that they pay
--   ledger           accounts, postings (one per cause), transfers (one debit, one credit, one positive amount),
--                    balances of days, closed months
--   merchant payouts terms of payouts to merchants, and these payouts
--   outbox           event types, events, handlers with their snapshot cursors, leased batches, retries, dead letters
--   audit            the audit trail, append-only
--   reconciliation   expected settlements, discrepancies, cursors of polling, checks of the provider's key
--
-- Conventions. Amounts are bigint minor units, named *_minor. Times are timestamptz in UTC, named *_at, and come from
-- surety.time_now(). Ids are text: a prefix, 12 hex digits of milliseconds, 20 random ones. They sort by time.
-- A constraint's name states its claim; those names are the vocabulary of the API's errors.
--
-- Invariants that constraints keep:
--
--   a step is legal                          steps (from_state, to_state) -> transitions
--   a step starts where the last ended       steps (payment_id, version - 1, from_state) -> steps (…, to_state)
--   a payment's state is its last step       payments (id, version, state) -> steps, in surety.sibling_keys as above
--   a posting is balanced                    each transfer has one debit, one credit, one amount
--   a cause posts once                       postings.cause is unique
--   a fact counts once                       the primary key of fact_keys
--
-- Every transaction locks in this order, each kind sorted and once: idempotency keys, references, money limits,
-- subjects of velocity rules (advisory locks), provider events and facts, payments, refunds, disputes, balances, batch.
-- db/__init__.py has the order by tables.

-- ---------------------------------------------------------------------------------------------------------- roles

-- Roles belong to the cluster, and several of its databases may be deployed concurrently.
do $$
declare
    v_role text;
begin
    foreach v_role in array array[
        'surety_owner', 'surety_api', 'surety_webhook', 'surety_worker', 'surety_analyst', 'surety_auditor'
    ] loop
        -- Where a superuser has made the roles, the login that deploys needs no right to create any.
        if not exists (select from pg_roles as r where r.rolname = v_role) then
            begin
                execute format('create role %I nologin', v_role);
            exception
                when duplicate_object or unique_violation then null;
            end;
        end if;
        -- The login that deploys may act as each role, so one login that is no superuser serves all processes.
        if not pg_has_role(current_user, v_role, 'usage') then
            execute format('grant %I to %I', v_role, current_user);
        end if;
    end loop;
    -- `surety status` names the sessions that hold back vacuum, also those of other roles. Without the right to grant
    -- this the deploy continues, and `surety status` says that it cannot see them.
    begin
        grant pg_read_all_stats to surety_owner;
    exception
        when insufficient_privilege or unique_violation then null;
    end;
end;
$$;

create schema surety authorization surety_owner;
create schema ledger authorization surety_owner;
create schema outbox authorization surety_owner;
create schema audit authorization surety_owner;
create schema api authorization surety_owner;
create schema report authorization surety_owner;
create schema invariant authorization surety_owner;

set local role surety_owner;

-- ---------------------------------------------------------------------------------------------------- environment

create table surety.environment (
    singleton boolean not null default true,
    id text collate "C" not null,
    kind text not null,
    livemode boolean not null default false,
    created_at timestamptz not null default now(),
    constraint environment_pkey primary key (singleton),
    constraint environment_is_one_row check (singleton),
    constraint environment_kind_is_known check (kind in ('production', 'test')),
    constraint test_environment_moves_no_real_money check (kind = 'production' or not livemode),
    constraint environment_kind_can_be_referred_to unique (kind),
    constraint environment_mode_can_be_referred_to unique (livemode)
);
comment on table surety.environment is
'One row: the identity of this database. Its id is in the metadata of our objects at providers, which distinguishes
money that another system moved from money that we lost track of. livemode: real money moves. Merchants
and facts without a payment refer to it, so it can''t change once there is one of them.';

create table surety.clock (
    kind text not null default 'test',
    ahead interval not null,
    constraint clock_pkey primary key (kind),
    constraint clock_is_for_tests check (kind = 'test'),
    constraint clock_moves_only_in_a_test_database foreign key (kind) references surety.environment (kind)
);
comment on table surety.clock is
'How far surety.time_now() is ahead of the server. A row can exist only where environment.kind is test.';

-- ---------------------------------------------------------------------------------------------------------- rules

create table surety.currencies (
    currency text collate "C" not null,
    exponent smallint not null,
    minimum_minor bigint not null,
    maximum_minor bigint not null,
    step_minor bigint not null,
    fee_fixed_minor bigint not null,
    constraint currencies_pkey primary key (currency),
    constraint currency_is_lower_case_iso_4217 check (currency ~ '^[a-z]{3}$'),
    constraint currency_exponent_is_known check (exponent in (0, 2, 3)),
    constraint currency_bounds_are_ordered check (minimum_minor between 1 and maximum_minor),
    constraint currency_step_is_a_power_of_ten check (step_minor in (1, 10, 100)),
    constraint three_decimal_amounts_end_in_zero check (exponent < 3 or step_minor = 10),
    constraint currency_bounds_are_multiples_of_the_step check (
        minimum_minor % step_minor = 0 and maximum_minor % step_minor = 0
    ),
    constraint currency_fee_is_below_the_smallest_amount check (
        fee_fixed_minor >= 0 and fee_fixed_minor < minimum_minor
    )
);
comment on table surety.currencies is
'Currencies accepted, with the provider''s rules: exponent is the number of minor digits, minimum_minor and
maximum_minor bound one payment''s amount in minor units. Every amount that is sent to the provider is a multiple of
step_minor. fee_fixed_minor is the fixed part of our fee.';

create table surety.states (
    state text collate "C" not null,
    position smallint not null,
    status text not null,
    is_final boolean not null,
    poll_after interval,
    overdue_after interval,
    meaning text not null,
    constraint states_pkey primary key (state),
    constraint state_position_is_unique unique (position),
    constraint state_status_is_known check (
        status in (
            'pending', 'requires_action', 'requires_capture', 'succeeded', 'failed', 'canceled',
            'partially_refunded', 'refunded', 'disputed', 'lost'
        )
    )
);
comment on table surety.states is
'The fourteen states. status is the coarse one that merchants see (surety.payment_status shows the exception);
poll_after is how long a payment may stay there
before the provider is polled (null: there is nothing to ask), overdue_after how long before `surety status` reports
it.';

create table surety.transitions (
    from_state text collate "C" not null,
    to_state text collate "C" not null,
    constraint transitions_pkey primary key (from_state, to_state),
    constraint transition_starts_in_a_state foreign key (from_state) references surety.states (state),
    constraint transition_ends_in_a_state foreign key (to_state) references surety.states (state)
);
comment on table surety.transitions is
'The legal steps. A step that is not a row here can''t be written.';

create table surety.mandatory_steps (
    rail text not null,
    capture_method text not null,
    position smallint not null,
    state text collate "C" not null,
    constraint mandatory_steps_pkey primary key (rail, capture_method, position),
    constraint mandatory_step_is_visited_once unique (rail, capture_method, state),
    constraint mandatory_step_is_a_state foreign key (state) references surety.states (state)
);
comment on table surety.mandatory_steps is
'The canonical path of each rail and capture method: the steps that every payment there makes, whatever order its facts
come in. surety.missing_steps relies on the positions: up to 3 lead to the provider, 4 is made if a fact proves it, 5 is
confirmed, 6 is settled.';

create table surety.fact_kinds (
    kind text collate "C" not null,
    family text not null,
    rank smallint not null,
    evidences text collate "C",
    meaning text not null,
    constraint fact_kinds_pkey primary key (kind),
    constraint fact_family_is_known check (
        family in ('intent', 'charge', 'card', 'command', 'refund', 'dispute', 'warning', 'return', 'money', 'payout')
    ),
    constraint fact_evidences_a_state foreign key (evidences) references surety.states (state)
);
comment on table surety.fact_kinds is
'The kinds of facts: what a provider can assert. Within a family the highest rank about one object wins; evidences names
the state that the fact alone proves.';

insert into surety.currencies (currency, exponent, minimum_minor, maximum_minor, step_minor, fee_fixed_minor) values
('usd', 2, 50, 99999999, 1, 35),
('eur', 2, 50, 99999999, 1, 35),
('gbp', 2, 30, 99999999, 1, 25),
('aud', 2, 50, 99999999, 1, 35),
('cad', 2, 50, 99999999, 1, 35),
('chf', 2, 50, 99999999, 1, 35),
('czk', 2, 1500, 99999999, 1, 800),
('dkk', 2, 250, 99999999, 1, 200),
('hkd', 2, 400, 99999999, 1, 275),
('jpy', 0, 50, 99999999, 1, 45),
('krw', 0, 500, 99999999, 1, 450),
('kwd', 3, 200, 99999990, 10, 110),
('mxn', 2, 1000, 99999999, 1, 650),
('nok', 2, 300, 99999999, 1, 250),
('nzd', 2, 50, 99999999, 1, 35),
('pln', 2, 200, 99999999, 1, 130),
('sek', 2, 300, 99999999, 1, 250),
('sgd', 2, 50, 99999999, 1, 45);

insert into surety.states (state, position, status, is_final, poll_after, overdue_after, meaning) values
('initiated', 1, 'pending', false, null, null, 'accepted and stored; nothing sent'),
('submitting', 2, 'pending', false, '5 minutes', '1 hour', 'a provider call is in flight, or its outcome is unknown'),
('provider_submitted', 3, 'pending', false, '60 seconds', '1 hour', 'the provider''s id is held'),
('requires_action', 4, 'requires_action', false, '60 seconds', '8 days', 'the payer must act'),
('authorized', 5, 'requires_capture', false, '1 hour', '32 days', 'funds held, not captured'),
('processing', 6, 'pending', false, '60 seconds', '1 hour', 'capture or the ACH network under way'),
('confirmed', 7, 'succeeded', false, null, null, 'the provider says that it succeeded'),
('settled', 8, 'succeeded', true, null, null, 'matched to money that arrived'),
('partially_refunded', 9, 'partially_refunded', true, null, null, 'a part of it was given back'),
('refunded', 10, 'refunded', true, null, null, 'all of it was given back'),
('disputed', 11, 'disputed', false, null, null, 'funds held back by the network'),
('reversed', 12, 'lost', true, null, null, 'all or a part was returned, or lost in a dispute'),
('failed', 13, 'failed', true, null, null, 'it did not succeed'),
('canceled', 14, 'canceled', true, null, null, 'canceled before it succeeded');

insert into surety.transitions (from_state, to_state) values
('initiated', 'submitting'),
('initiated', 'canceled'),
('initiated', 'failed'),
('submitting', 'provider_submitted'),
('submitting', 'failed'),
('submitting', 'canceled'),
('provider_submitted', 'requires_action'),
('provider_submitted', 'authorized'),
('provider_submitted', 'processing'),
('provider_submitted', 'confirmed'),
('provider_submitted', 'failed'),
('provider_submitted', 'canceled'),
('requires_action', 'authorized'),
('requires_action', 'processing'),
('requires_action', 'confirmed'),
('requires_action', 'failed'),
('requires_action', 'canceled'),
('authorized', 'processing'),
('authorized', 'confirmed'),
('authorized', 'failed'),
('authorized', 'canceled'),
('processing', 'authorized'),
('processing', 'confirmed'),
('processing', 'failed'),
('processing', 'canceled'),
('confirmed', 'settled'),
('confirmed', 'partially_refunded'),
('confirmed', 'refunded'),
('confirmed', 'disputed'),
('confirmed', 'reversed'),
('settled', 'partially_refunded'),
('settled', 'refunded'),
('settled', 'disputed'),
('settled', 'reversed'),
('partially_refunded', 'partially_refunded'),
('partially_refunded', 'refunded'),
('partially_refunded', 'confirmed'),
('partially_refunded', 'settled'),
('partially_refunded', 'disputed'),
('partially_refunded', 'reversed'),
('refunded', 'partially_refunded'),
('refunded', 'confirmed'),
('refunded', 'settled'),
('refunded', 'disputed'),
('refunded', 'reversed'),
('disputed', 'confirmed'),
('disputed', 'settled'),
('disputed', 'partially_refunded'),
('disputed', 'refunded'),
('disputed', 'reversed'),
('reversed', 'disputed'),
('reversed', 'settled'),
('reversed', 'confirmed'),
('reversed', 'partially_refunded'),
('reversed', 'refunded'),
('failed', 'confirmed'),
('canceled', 'confirmed');

insert into surety.mandatory_steps (rail, capture_method, position, state) values
('card', 'automatic', 1, 'initiated'),
('card', 'automatic', 2, 'submitting'),
('card', 'automatic', 3, 'provider_submitted'),
('card', 'automatic', 5, 'confirmed'),
('card', 'automatic', 6, 'settled'),
('card', 'manual', 1, 'initiated'),
('card', 'manual', 2, 'submitting'),
('card', 'manual', 3, 'provider_submitted'),
('card', 'manual', 4, 'authorized'),
('card', 'manual', 5, 'confirmed'),
('card', 'manual', 6, 'settled'),
('ach', 'automatic', 1, 'initiated'),
('ach', 'automatic', 2, 'submitting'),
('ach', 'automatic', 3, 'provider_submitted'),
('ach', 'automatic', 4, 'processing'),
('ach', 'automatic', 5, 'confirmed'),
('ach', 'automatic', 6, 'settled');

insert into surety.fact_kinds (kind, family, rank, evidences, meaning) values
('submitted', 'intent', 1, 'provider_submitted', 'the provider holds the payment under this id'),
('action', 'intent', 2, 'requires_action', 'the payer must act; data.next_action says how'),
('processing', 'intent', 3, 'processing', 'the network is at work'),
('attempt_failed', 'intent', 3, null, 'one attempt was declined; the intent still lives'),
('failed', 'intent', 4, 'failed', 'the intent was ended after a decline'),
('canceled', 'intent', 4, 'canceled', 'the intent was canceled'),
('authorized', 'charge', 1, 'authorized', 'funds are held'),
('captured', 'charge', 2, 'confirmed', 'the amount was captured'),
('card', 'card', 1, null, 'the charged card as merchants see it, which the charge''s first fact did not show'),
('capture_requested', 'command', 1, 'processing', 'the merchant asked us to capture'),
('capture_refused', 'command', 2, null, 'the provider would not capture that; the hold lives'),
('refund_pending', 'refund', 1, null, 'a refund is under way'),
('refund_action', 'refund', 2, null, 'the payer must say where a refund is to go'),
('refund_succeeded', 'refund', 3, null, 'a refund reached the payer'),
('refund_canceled', 'refund', 4, null, 'a refund was canceled'),
('refund_failed', 'refund', 5, null, 'a refund came back'),
('dispute_flagged', 'dispute', 1, null, 'an inquiry, or a dispute for which nothing was withdrawn'),
('dispute_opened', 'dispute', 1, 'disputed', 'the network withdrew the amount'),
('dispute_lost', 'dispute', 1, 'reversed', 'the network keeps it'),
('dispute_won', 'dispute', 1, null, 'the network gave it back'),
('fraud_warning', 'warning', 1, null, 'the card''s issuer suspects fraud; a refund may avoid a dispute'),
('fraud_warning_closed', 'warning', 2, null, 'the same, after a refund of all or a dispute'),
('returned', 'return', 1, 'processing', 'an ACH entry came back; if it was captured, that is reversed'),
('dishonored', 'return', 2, 'processing', 'the return was refused: the entry stands'),
('contested', 'return', 3, 'processing', 'the return was made again, and stands'),
('money', 'money', 1, null, 'a balance transaction: the provider''s money moved'),
('available', 'money', 2, null, 'the balance transaction''s money may be paid out'),
('payout', 'payout', 1, null, 'the provider sent money to the bank'),
('payout_failed', 'payout', 2, null, 'the money came back');

create table surety.refund_states (
    state text collate "C" not null,
    position smallint not null,
    is_live boolean not null,
    poll_after interval,
    overdue_after interval,
    meaning text not null,
    constraint refund_states_pkey primary key (state),
    constraint refund_state_position_is_unique unique (position)
);
comment on table surety.refund_states is
'The states of a refund. A live one takes up a part of what was captured; poll_after is how long a refund may stay there
before the provider is polled (null: there is nothing to ask), overdue_after how long before `surety status` reports
it.';

create table surety.refund_transitions (
    from_state text collate "C" not null,
    to_state text collate "C" not null,
    constraint refund_transitions_pkey primary key (from_state, to_state),
    constraint refund_transition_starts_in_a_state foreign key (from_state) references surety.refund_states (state),
    constraint refund_transition_ends_in_a_state foreign key (to_state) references surety.refund_states (state)
);
comment on table surety.refund_transitions is
'The legal steps of a refund. Any other can''t be written.';

create table surety.dispute_statuses (
    status text collate "C" not null,
    position smallint not null,
    takes_evidence boolean not null,
    poll_after interval,
    overdue_after interval,
    meaning text not null,
    constraint dispute_statuses_pkey primary key (status),
    constraint dispute_status_position_is_unique unique (position)
);
comment on table surety.dispute_statuses is
'The statuses of disputes as Stripe publishes them. Balance transactions show which amount was withdrawn; a final status
says whether the merchant gets it back (won) or the network keeps it (lost, prevented). overdue_after is how long after
its creation `surety status` reports a dispute that is still there.';

insert into surety.dispute_statuses (status, position, takes_evidence, poll_after, overdue_after, meaning) values
('warning_needs_response', 1, true, '6 hours', '150 days', 'an inquiry: nothing was withdrawn, an answer may end it'),
('warning_under_review', 2, false, '6 hours', '150 days', 'an inquiry that was answered'),
('warning_closed', 3, false, null, null, 'an inquiry that ended'),
('needs_response', 4, true, '6 hours', '150 days', 'the amount was withdrawn; evidence is due'),
('under_review', 5, false, '6 hours', '150 days', 'evidence was submitted'),
('won', 6, false, null, null, 'the amount was given back'),
('lost', 7, false, null, null, 'the network keeps it; an appeal may still win it'),
('prevented', 8, false, null, null, 'resolved before it became a dispute; the network keeps what it withdrew'),
('appeal_needs_response', 9, true, '6 hours', '150 days', 'lost, but open to appeal: evidence is due again'),
('appeal_under_review', 10, false, '6 hours', '150 days', 'an appeal was submitted');

insert into surety.refund_states (state, position, is_live, poll_after, overdue_after, meaning) values
('pending', 1, true, '60 seconds', '14 days', 'asked for; on its way to the provider or with it'),
('requires_action', 2, true, '10 minutes', '45 days', 'the payer must say where it is to go'),
('succeeded', 3, true, null, null, 'on its way to the payer; it may still come back'),
('failed', 4, false, null, null, 'refused, or it came back'),
('canceled', 5, false, null, null, 'canceled before it reached the payer');

insert into surety.refund_transitions (from_state, to_state) values
('pending', 'requires_action'),
('pending', 'succeeded'),
('pending', 'failed'),
('pending', 'canceled'),
('requires_action', 'succeeded'),
('requires_action', 'failed'),
('requires_action', 'canceled'),
('succeeded', 'failed'),
('succeeded', 'canceled'),
('canceled', 'failed');

-- ------------------------------------------------------------------------------------------------------ merchants

create table surety.merchants (
    id text collate "C" not null,
    name text not null,
    provider_account text not null default '',
    fee_basis_points integer not null default 340,
    created_at timestamptz not null,
    suspended_at timestamptz,
    livemode boolean not null,
    constraint merchants_pkey primary key (id),
    constraint merchant_has_the_mode_of_its_database foreign key (livemode) references surety.environment (livemode),
    constraint merchant_mode_can_be_referred_to unique (id, livemode),
    constraint merchant_id_is_a_merchant_id check (id ~ '^mer_[0-9a-f]{24}$'),
    constraint merchant_name_is_short check (char_length(name) between 1 and 200),
    -- No control characters, and none that change the direction of a line.
    constraint merchant_name_is_printable check (
        name ~ '^\S' and name ~ '\S$' and name !~ '[\u0001-\u001f\u007f-\u009f\u200e\u200f\u2028-\u202e\u2066-\u2069]'
    ),
    constraint provider_account_is_an_account_id check (provider_account ~ '^(acct_[0-9A-Za-z_]{1,200})?$'),
    constraint merchant_fee_is_a_part check (fee_basis_points between 0 and 10000)
);
comment on table surety.merchants is
'The businesses that are paid. provider_account is their account at the provider, empty for the platform''s own. Our
fee is amount * fee_basis_points / 10000, rounded half to even, plus the fixed fee of the currency, until
surety.fee_rates says otherwise.';

create unique index merchants_account on surety.merchants (provider_account) where provider_account <> '';
comment on index surety.merchants_account is
'Two merchants on one account would book its money twice.';

create table surety.fee_rates (
    merchant_id text collate "C" not null,
    currency text collate "C" not null,
    effective_at timestamptz not null,
    basis_points integer not null,
    fixed_minor bigint not null,
    set_by text not null,
    set_at timestamptz not null,
    constraint fee_rates_pkey primary key (merchant_id, currency, effective_at),
    constraint fee_rate_belongs_to_a_merchant foreign key (merchant_id) references surety.merchants (id),
    constraint fee_rate_currency_is_known foreign key (currency) references surety.currencies (currency),
    constraint fee_rate_is_a_part check (basis_points between 0 and 10000),
    constraint fee_rate_fixed_part_is_not_negative check (fixed_minor >= 0),
    constraint fee_rate_begins_later_than_it_is_set check (effective_at >= set_at + interval '1 minute')
);
comment on table surety.fee_rates is
'Changes of merchants'' fees, append-only. A payment pays the rate that is in force at its created_at. A rate begins a
minute or more after it is set, so it alters no accepted payment, whatever was committed first. Without a row, the rate
of the merchant and its currency is in force.';

create table surety.fee_rate_withdrawals (
    merchant_id text collate "C" not null,
    currency text collate "C" not null,
    effective_at timestamptz not null,
    withdrawn_by text not null,
    withdrawn_at timestamptz not null,
    constraint fee_rate_withdrawals_pkey primary key (merchant_id, currency, effective_at),
    constraint fee_rate_withdrawal_is_of_a_rate foreign key (merchant_id, currency, effective_at)
    references surety.fee_rates (merchant_id, currency, effective_at),
    constraint fee_rate_is_withdrawn_before_it_begins check (effective_at >= withdrawn_at + interval '1 minute')
);
comment on table surety.fee_rate_withdrawals is
'Changes of merchants'' fees that were withdrawn before they began, append-only: they are never in force. A change that
has begun, or begins within a minute, stays, so a withdrawal alters no accepted payment.';

create table surety.api_keys (
    id text collate "C" not null,
    merchant_id text collate "C" not null,
    name text not null,
    scopes text[] not null,
    networks cidr[] not null,
    hash bytea not null,
    hint text not null,
    created_by text not null,
    created_at timestamptz not null,
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used_at timestamptz,
    constraint api_keys_pkey primary key (id),
    constraint api_key_id_is_a_key_id check (id ~ '^key_[0-9a-f]{24}$'),
    constraint api_key_belongs_to_a_merchant foreign key (merchant_id) references surety.merchants (id),
    constraint api_key_hash_is_unique unique (hash),
    constraint api_key_hash_is_sha256 check (length(hash) = 32),
    constraint api_key_name_is_short_and_plain check (name ~ '^[A-Za-z0-9._@-]{1,100}$'),
    constraint api_key_scopes_are_known check (
        scopes <> '{}'
        and scopes <@ array['disputes:write', 'payments:write', 'read', 'refunds:write', 'webhooks:write']
    ),
    constraint api_key_networks_are_few check (cardinality(networks) <= 50),
    constraint api_key_expires_after_its_creation check (expires_at > created_at)
) with (fillfactor = 80);
comment on table surety.api_keys is
'API keys by their SHA-256; a key itself is shown once, when it is created. hint holds its last characters. scopes is
sorted. Without networks a key is valid from every address, without expires_at until it is revoked. last_used_at is
written at most once a minute.';

-- ------------------------------------------------------------------------------------------------------ operators

create table surety.operator_roles (
    role text not null,
    position smallint not null,
    meaning text not null,
    constraint operator_roles_pkey primary key (role),
    constraint operator_role_position_is_unique unique (position)
);
comment on table surety.operator_roles is
'The roles of operators.';

create table surety.role_scopes (
    role text not null,
    scope text not null,
    constraint role_scopes_pkey primary key (role, scope),
    constraint role_scope_belongs_to_a_role foreign key (role) references surety.operator_roles (role)
);
comment on table surety.role_scopes is
'Which role may do what, by the API and by the command line. surety.check_operator decides by these rows.';

insert into surety.operator_roles (role, position, meaning) values
('viewer', 1, 'reads'),
('support', 2, 'helps merchants: replays dead letters, revokes keys'),
('finance', 3, 'decides about money: dead letters and discrepancies'),
('admin', 4, 'everything');

insert into surety.role_scopes (role, scope)
select operator_roles.role, rights.scope
from surety.operator_roles
inner join (
    values
    ('status:read', array['viewer', 'support', 'finance', 'admin']),
    ('dead-letters:read', array['viewer', 'support', 'finance', 'admin']),
    ('dead-letters:replay', array['support', 'finance', 'admin']),
    ('dead-letters:discard', array['finance', 'admin']),
    ('discrepancies:read', array['viewer', 'support', 'finance', 'admin']),
    ('discrepancies:assign', array['support', 'finance', 'admin']),
    ('discrepancies:resolve', array['finance', 'admin']),
    ('books:close', array['finance', 'admin']),
    ('statements:import', array['finance', 'admin']),
    ('merchant-payouts:write', array['finance', 'admin']),
    ('holds:read', array['viewer', 'support', 'finance', 'admin']),
    ('holds:decide', array['finance', 'admin']),
    ('webhook-endpoints:write', array['support', 'admin']),
    ('limits:write', array['admin']),
    ('payer-accounts:write', array['finance', 'admin']),
    ('keys:revoke', array['support', 'admin']),
    ('keys:write', array['admin']),
    ('merchants:write', array['admin']),
    ('handlers:write', array['admin']),
    ('customers:erase', array['admin']),
    ('mode:write', array['admin']),
    ('operators:write', array['admin']),
    ('operators:act-as', array['admin'])
) as rights (scope, roles) on operator_roles.role = any(rights.roles);

create table surety.operators (
    id text collate "C" not null,
    name text not null,
    email text not null,
    role text not null,
    created_by text not null,
    created_at timestamptz not null,
    deactivated_at timestamptz,
    constraint operators_pkey primary key (id),
    constraint operator_id_is_an_operator_id check (id ~ '^opr_[0-9a-f]{24}$'),
    constraint operator_name_is_unique unique (name),
    constraint operator_name_is_short_and_plain check (name ~ '^[A-Za-z0-9._@-]{1,100}$'),
    constraint operator_email_is_unique unique (email),
    constraint operator_email_is_an_address check (
        char_length(email) <= 254 and email ~ '^[^\s@<>]+@[^\s@<>]+$' and email = lower(email collate "C")
    ),
    constraint operator_role_is_known foreign key (role) references surety.operator_roles (role)
);
comment on table surety.operators is
'The people who operate Surety. The audit trail names them, so a name never changes and no account is deleted.';

create table surety.operator_keys (
    id text collate "C" not null,
    operator_id text collate "C" not null,
    role text not null,
    networks cidr[] not null,
    hash bytea not null,
    hint text not null,
    created_by text not null,
    created_at timestamptz not null,
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used_at timestamptz,
    constraint operator_keys_pkey primary key (id),
    constraint operator_key_id_is_a_key_id check (id ~ '^key_[0-9a-f]{24}$'),
    constraint operator_key_belongs_to_an_operator foreign key (operator_id) references surety.operators (id),
    constraint operator_key_role_is_known foreign key (role) references surety.operator_roles (role),
    constraint operator_key_hash_is_unique unique (hash),
    constraint operator_key_hash_is_sha256 check (length(hash) = 32),
    constraint operator_key_networks_are_few check (cardinality(networks) <= 50),
    constraint operator_key_expires_after_its_creation check (expires_at > created_at)
) with (fillfactor = 80);
comment on table surety.operator_keys is
'Personal keys of operators, stored like merchants'' keys, for the API and the command line. A key may do what both its
role and its operator''s role may. networks apply to the API only.';

-- ---------------------------------------------------------------------------------------------------- rate limits

create table surety.rate_limits (
    subject text collate "C" not null,
    requests_per_second integer not null,
    burst integer not null,
    constraint rate_limits_pkey primary key (subject),
    constraint rate_limit_subject_is_known check (
        subject ~ '^(key|mer)_[0-9a-f]{24}$' or subject in ('keys', 'merchants', 'operator-keys')
    ),
    constraint rate_limit_is_bounded check (
        requests_per_second between 0 and 1000000 and burst between 0 and 1000000
    ),
    constraint rate_limit_has_a_burst check ((requests_per_second = 0) = (burst = 0))
);
comment on table surety.rate_limits is
'How many requests a second a key or a merchant may send, and how many at once after a pause (burst). Zero is no limit.
subject is the id of a key or merchant. A key or merchant without a row has the limit of keys, operator-keys or
merchants.';

insert into surety.rate_limits (subject, requests_per_second, burst) values
('keys', 500, 1000),
('merchants', 1000, 2000),
('operator-keys', 100, 200);

-- Half of each page is left free, so that an update finds room on it and writes no index entry.
create unlogged table surety.rate_limit_uses (
    subject text collate "C" not null,
    whole_at timestamptz not null,
    constraint rate_limit_uses_pkey primary key (subject)
) with (fillfactor = 50);
comment on table surety.rate_limit_uses is
'When the burst of each limited key and merchant is whole again if no more permits are taken (the theoretical arrival
time of GCRA). A row whose time has passed means the same as none. A crash of the server empties the table: all bursts
are whole then.';

-- ------------------------------------------------------------------------------------------------------- requests

create table surety.idempotency_keys (
    merchant_id text collate "C" not null,
    route text not null,
    key text collate "C" not null,
    request_hash bytea not null,
    payment_id text collate "C" not null,
    status smallint not null,
    response text not null,
    created_at timestamptz not null,
    constraint idempotency_keys_pkey primary key (merchant_id, route, key),
    constraint idempotency_key_is_printable check (length(key) between 1 and 255 and key ~ '^[ -~]+$')
);
create index idempotency_keys_by_age on surety.idempotency_keys (created_at);
comment on table surety.idempotency_keys is
'Responses that took effect, kept for 30 days: a repeated request gets the first response byte for byte.';

-- The result of a command: a document, or a problem of the API with its details.
create type api.outcome as (
    status smallint,
    problem text,
    detail jsonb,
    body text,
    is_replayed boolean
);

-- The sender and the idempotency key of a command. outcome is set if the command ends before it takes effect.
create type api.admission as (
    merchant_id text,
    actor text,
    route text,
    key text,
    admitted_at timestamptz,
    outcome api.outcome
);

create table surety.payment_references (
    merchant_id text collate "C" not null,
    reference text collate "C" not null,
    payment_id text collate "C" not null,
    constraint payment_references_pkey primary key (merchant_id, reference)
);
create table surety.payment_labels (
    merchant_id text collate "C" not null,
    name text collate "C" not null,
    value text collate "C" not null,
    payment_id text collate "C" not null,
    constraint payment_labels_pkey primary key (merchant_id, name, value, payment_id)
);
comment on table surety.payment_labels is
'The texts by which merchants find their payments: metadata.KEY, and customer.email as it is compared
(surety.fold_email).';
comment on table surety.payment_references is
'References in use, by payments that are neither failed nor canceled.';

-- ------------------------------------------------------------------------------------------------------ customers

create table surety.customers (
    id text collate "C" not null,
    merchant_id text collate "C" not null,
    livemode boolean not null,
    version integer not null default 1,
    email text,
    folded_email text collate "C",
    name text,
    phone text,
    description text,
    shipping jsonb,
    metadata jsonb not null default '{}',
    provider text not null,
    provider_account text not null,
    provider_id text collate "C",
    provider_version integer not null default 0,
    provider_failure jsonb,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    erased_at timestamptz,
    constraint customers_pkey primary key (id),
    constraint customer_id_is_a_customer_id check (id ~ '^cus_[0-9a-f]{24}$'),
    constraint customer_belongs_to_a_merchant foreign key (merchant_id, livemode)
    references surety.merchants (id, livemode),
    constraint customer_of_its_merchant_can_be_referred_to unique (merchant_id, id),
    constraint customer_email_is_short check (char_length(email) between 3 and 254),
    constraint customer_email_has_a_form_to_compare check ((email is null) = (folded_email is null)),
    constraint customer_name_is_short check (char_length(name) between 1 and 200),
    constraint customer_phone_is_short check (char_length(phone) between 1 and 20),
    constraint customer_description_is_short check (char_length(description) between 1 and 1000),
    constraint customer_metadata_is_an_object check (jsonb_typeof(metadata) = 'object'),
    constraint customer_version_is_positive check (version >= 1),
    constraint provider_holds_a_version_of_the_customer check (provider_version between 0 and version),
    constraint erased_customer_has_no_personal_data check (
        erased_at is null or num_nonnulls(email, name, phone, description, shipping) = 0
    )
);
create index customers_by_email on surety.customers (merchant_id, folded_email, id) where folded_email is not null;
create unique index customer_is_one_at_its_provider on surety.customers (provider, provider_account, provider_id)
where provider_id is not null;
comment on table surety.customers is
'Merchants'' customers. folded_email is the address as it is compared (surety.fold_email). A worker creates one at the
provider before its first payment (provider_id), and passes later changes on: provider_version is the last version that
it answered about, provider_failure why it did not take that one. erased_at: the personal data are erased.';

create table surety.payment_methods (
    id text collate "C" not null,
    customer_id text collate "C" not null,
    merchant_id text collate "C" not null,
    type text not null,
    brand text,
    last4 text,
    exp_month smallint,
    exp_year smallint,
    country text,
    fingerprint text,
    provider_id text collate "C" not null,
    usage text not null,
    mandate jsonb not null,
    payment_id text collate "C" not null,
    created_at timestamptz not null,
    detached_at timestamptz,
    constraint payment_methods_pkey primary key (id),
    constraint payment_method_id_is_a_payment_method_id check (id ~ '^spm_[0-9a-f]{24}$'),
    constraint payment_method_belongs_to_its_merchants_customer foreign key (merchant_id, customer_id)
    references surety.customers (merchant_id, id),
    constraint payment_method_of_its_customer_can_be_referred_to unique (customer_id, id),
    constraint payment_method_is_saved_once unique (customer_id, provider_id),
    constraint payment_method_is_a_card check (type = 'card'),
    constraint payment_method_usage_is_known check (usage in ('off_session')),
    constraint payment_method_expires_in_a_month check (exp_month between 1 and 12)
);
comment on table surety.payment_methods is
'Payment methods saved for later payments, as the provider shows them once a payment has proved them. mandate: when,
from where and to which text the payer agreed. detached_at: it was removed, by the merchant or at the provider.';
create index payment_methods_of_a_payment on surety.payment_methods (payment_id);
create index payment_methods_at_the_provider on surety.payment_methods (provider_id);
create index payment_methods_of_a_card on surety.payment_methods (merchant_id, fingerprint)
where fingerprint is not null;

create table surety.payer_accounts (
    id text collate "C" not null,
    merchant_id text collate "C" not null,
    customer_id text collate "C" not null,
    routing_number text not null,
    account_type text not null,
    holder_type text not null,
    holder_name text,
    last4 text not null,
    sealed_number bytea,
    key_id text,
    fingerprint bytea,
    mandate jsonb not null,
    mandate_revoked_at timestamptz,
    validation text not null default 'unvalidated',
    validation_method text,
    validated_version integer,
    validation_changed_at timestamptz not null,
    version integer not null default 1,
    created_at timestamptz not null,
    removed_at timestamptz,
    constraint payer_accounts_pkey primary key (id),
    constraint payer_account_id_is_a_payer_account_id check (id ~ '^bac_[0-9a-f]{24}$'),
    constraint payer_account_belongs_to_its_merchants_customer foreign key (merchant_id, customer_id)
    references surety.customers (merchant_id, id),
    constraint payer_account_of_its_customer_can_be_referred_to unique (customer_id, id),
    constraint routing_number_has_its_check_digit check (
        routing_number ~ '^[0-9]{9}$' and routing_number <> '000000000' and (
            3 * (substr(routing_number, 1, 1)::integer + substr(routing_number, 4, 1)::integer
                + substr(routing_number, 7, 1)::integer)
            + 7 * (substr(routing_number, 2, 1)::integer + substr(routing_number, 5, 1)::integer
                + substr(routing_number, 8, 1)::integer)
            + substr(routing_number, 3, 1)::integer + substr(routing_number, 6, 1)::integer
            + substr(routing_number, 9, 1)::integer
        ) % 10 = 0
    ),
    constraint payer_account_type_is_known check (account_type in ('checking', 'savings')),
    constraint payer_account_holder_type_is_known check (holder_type in ('individual', 'company')),
    constraint payer_account_holder_name_is_short check (char_length(holder_name) between 1 and 100),
    constraint payer_account_is_shown_by_four_characters check (last4 ~ '^[0-9A-Z]{2,4}$'),
    constraint sealed_number_has_its_key_and_fingerprint check (
        num_nonnulls(sealed_number, key_id, fingerprint) in (0, 3)
    ),
    constraint account_number_is_erased_with_its_account check (sealed_number is not null or removed_at is not null),
    constraint payer_account_fingerprint_is_sha256 check (octet_length(fingerprint) = 32),
    constraint mandate_says_when_where_and_to_which_text check (
        jsonb_typeof(mandate) = 'object' and mandate ?& array['accepted_at', 'ip_address', 'text']
    ),
    constraint payer_account_validation_is_known check (
        validation in ('unvalidated', 'pending', 'validated', 'failed')
    ),
    constraint payer_account_validation_has_a_method check (
        validation_method in ('prenote', 'micro_entries', 'account_check', 'statement')
        and (validation_method is not null) = (validation <> 'unvalidated')
    ),
    constraint validation_is_of_the_accounts_version check (
        (validation = 'validated') = (validated_version is not null) and validated_version = version
    ),
    constraint payer_account_version_is_positive check (version >= 1)
);
create unique index payer_account_is_saved_once on surety.payer_accounts (customer_id, fingerprint)
where removed_at is null;
create index payer_accounts_by_fingerprint on surety.payer_accounts (fingerprint) where fingerprint is not null;
create index payer_accounts_by_key on surety.payer_accounts (key_id, id) where key_id is not null;
comment on table surety.payer_accounts is
'Customers'' bank accounts for ACH. sealed_number is the account number, encrypted by the key key_id
(db/account_numbers.py); fingerprint is its keyed hash with the routing number, for equality. A change of the account
raises its version and ends its validation. mandate: when, from where and to which text the payer agreed; it is kept for
two years after its revocation.';

create table surety.ach_return_codes (
    code text not null,
    kind text not null,
    meaning text not null,
    window_days smallint,
    window_unit text not null,
    presentation text not null,
    freezes boolean not null,
    rate_group text,
    merchant_action text not null,
    constraint ach_return_codes_pkey primary key (code),
    constraint return_code_is_a_code check (code ~ '^R[0-9]{2}$'),
    constraint return_code_kind_is_known check (kind in ('return', 'dishonored', 'contested')),
    constraint return_window_unit_is_known check (
        window_unit in ('banking_days', 'calendar_days', 'next_file_of_the_operator', 'by_agreement', 'unknown')
    ),
    constraint return_window_has_days check (
        (window_days is not null) = (window_unit in ('banking_days', 'calendar_days')) and window_days > 0
    ),
    constraint return_presentation_is_known check (
        presentation in (
            'never', 'twice_within_180_days', 'with_a_new_authorization', 'after_correction', 'corrected_within_60_days'
        )
    ),
    constraint return_rate_group_is_known check (rate_group in ('unauthorized', 'administrative'))
);
comment on table surety.ach_return_codes is
'Codes of ACH returns, dishonored and contested returns: the time within which one comes, whether the entry may be
presented again, whether it freezes the account, in which of Nacha''s return rates it counts, what the merchant does.
Codes without a row are read and shown too.';

insert into surety.ach_return_codes (
    code, kind, meaning, window_days, window_unit, presentation, freezes, rate_group, merchant_action
) values
(
    'R01', 'return', 'insufficient funds',
    2, 'banking_days', 'twice_within_180_days', false, null,
    'the payer''s account lacked the money: present it again, or ask for another method'
),
(
    'R02', 'return', 'account closed',
    2, 'banking_days', 'never', true, 'administrative',
    'ask the payer for another account'
),
(
    'R03', 'return', 'no account, or not the holder''s',
    2, 'banking_days', 'after_correction', true, 'administrative',
    'ask the payer to correct the account'
),
(
    'R04', 'return', 'invalid account number',
    2, 'banking_days', 'after_correction', true, 'administrative',
    'ask the payer to correct the account number'
),
(
    'R05', 'return', 'consumer''s account debited under a corporate entry class',
    60, 'calendar_days', 'never', true, 'unauthorized',
    'get a consumer''s authorization; do not debit again'
),
(
    'R06', 'return', 'returned at the ODFI''s request',
    2, 'banking_days', 'never', false, null,
    'none: the bank asked for it'
),
(
    'R07', 'return', 'authorization revoked',
    60, 'calendar_days', 'never', true, 'unauthorized',
    'stop all debits of this payer'
),
(
    'R08', 'return', 'payment stopped',
    2, 'banking_days', 'with_a_new_authorization', true, null,
    'get a new authorization before another debit'
),
(
    'R09', 'return', 'uncollected funds',
    2, 'banking_days', 'twice_within_180_days', false, null,
    'present it again, or ask for another method'
),
(
    'R10', 'return', 'originator not known or not authorized',
    60, 'calendar_days', 'never', true, 'unauthorized',
    'stop all debits; check who gave the account'
),
(
    'R11', 'return', 'not in accordance with the authorization',
    60, 'calendar_days', 'corrected_within_60_days', true, 'unauthorized',
    'correct the error, then present it again within 60 days'
),
(
    'R12', 'return', 'account sold to another bank',
    2, 'banking_days', 'after_correction', false, null,
    'ask the payer for the new account'
),
(
    'R13', 'return', 'invalid routing number',
    null, 'next_file_of_the_operator', 'after_correction', false, null,
    'correct the routing number'
),
(
    'R14', 'return', 'representative payee deceased',
    2, 'banking_days', 'never', false, null,
    'stop debits; settle with the heirs'
),
(
    'R15', 'return', 'holder deceased',
    2, 'banking_days', 'never', false, null,
    'stop debits; settle with the heirs'
),
(
    'R16', 'return', 'account frozen, or by order of OFAC',
    2, 'banking_days', 'never', true, null,
    'stop debits; ask for another method'
),
(
    'R17', 'return', 'edit criteria not met, or QUESTIONABLE: a suspected false pretense',
    2, 'banking_days', 'after_correction', false, null,
    'correct the entry; if QUESTIONABLE, never again'
),
(
    'R18', 'return', 'improper effective entry date',
    null, 'next_file_of_the_operator', 'after_correction', false, null,
    'none: the entry is corrected'
),
(
    'R19', 'return', 'amount field in error',
    null, 'next_file_of_the_operator', 'after_correction', false, null,
    'none: the entry is corrected'
),
(
    'R20', 'return', 'account does not take such entries',
    2, 'banking_days', 'never', true, null,
    'ask the payer for another account'
),
(
    'R21', 'return', 'invalid company identification',
    2, 'banking_days', 'after_correction', false, null,
    'correct the company id'
),
(
    'R22', 'return', 'invalid individual id',
    2, 'banking_days', 'after_correction', false, null,
    'correct the individual id'
),
(
    'R23', 'return', 'credit refused by its receiver',
    2, 'banking_days', 'never', false, null,
    'ask the payer how to pay them'
),
(
    'R24', 'return', 'duplicate entry',
    2, 'banking_days', 'never', false, null,
    'check for a payment made twice'
),
(
    'R25', 'return', 'addenda in error',
    null, 'next_file_of_the_operator', 'after_correction', false, null,
    'none: the entry is corrected'
),
(
    'R26', 'return', 'mandatory field in error',
    null, 'next_file_of_the_operator', 'after_correction', false, null,
    'none: the entry is corrected'
),
(
    'R27', 'return', 'trace number in error',
    null, 'next_file_of_the_operator', 'after_correction', false, null,
    'none: the entry is corrected'
),
(
    'R28', 'return', 'check digit in error',
    null, 'next_file_of_the_operator', 'after_correction', false, null,
    'correct the routing number'
),
(
    'R29', 'return', 'corporate customer: not authorized',
    2, 'banking_days', 'never', true, 'unauthorized',
    'stop all debits; get an authorization'
),
(
    'R30', 'return', 'not a participant in check truncation',
    null, 'next_file_of_the_operator', 'never', false, null,
    'nothing'
),
(
    'R31', 'return', 'permissible return, by agreement of both banks',
    null, 'by_agreement', 'never', false, null,
    'nothing'
),
(
    'R32', 'return', 'RDFI does not settle',
    null, 'next_file_of_the_operator', 'never', false, null,
    'ask for another account'
),
(
    'R33', 'return', 'return of an XCK entry',
    60, 'calendar_days', 'never', false, null,
    'nothing'
),
(
    'R34', 'return', 'participation of the RDFI is limited',
    null, 'next_file_of_the_operator', 'never', false, null,
    'ask for another account'
),
(
    'R35', 'return', 'improper debit',
    null, 'next_file_of_the_operator', 'never', false, null,
    'ask for another method'
),
(
    'R36', 'return', 'improper credit',
    null, 'next_file_of_the_operator', 'never', false, null,
    'ask the payer how to pay them'
),
(
    'R37', 'return', 'source document presented for payment',
    60, 'calendar_days', 'never', false, null,
    'do not debit again: it was paid'
),
(
    'R38', 'return', 'source document stopped',
    60, 'calendar_days', 'never', false, null,
    'ask for another method'
),
(
    'R39', 'return', 'improper source document',
    2, 'banking_days', 'never', false, null,
    'ask for another method'
),
(
    'R40', 'return', 'return of an enrollment entry',
    null, 'unknown', 'never', false, null,
    'none: enrollments are not sent'
),
(
    'R41', 'return', 'enrollment: invalid transaction code',
    null, 'unknown', 'never', false, null,
    'none: enrollments are not sent'
),
(
    'R42', 'return', 'enrollment: routing number or check digit in error',
    null, 'unknown', 'never', false, null,
    'none: enrollments are not sent'
),
(
    'R43', 'return', 'enrollment: invalid account number',
    null, 'unknown', 'never', false, null,
    'none: enrollments are not sent'
),
(
    'R44', 'return', 'enrollment: invalid individual id',
    null, 'unknown', 'never', false, null,
    'none: enrollments are not sent'
),
(
    'R45', 'return', 'enrollment: invalid name',
    null, 'unknown', 'never', false, null,
    'none: enrollments are not sent'
),
(
    'R46', 'return', 'enrollment: invalid representative payee indicator',
    null, 'unknown', 'never', false, null,
    'none: enrollments are not sent'
),
(
    'R47', 'return', 'duplicate enrollment',
    null, 'unknown', 'never', false, null,
    'none: enrollments are not sent'
),
(
    'R50', 'return', 'state law affects the acceptance of RCK entries',
    2, 'banking_days', 'never', false, null,
    'ask for another method'
),
(
    'R51', 'return', 'item related to an RCK entry is ineligible',
    60, 'calendar_days', 'never', false, 'unauthorized',
    'ask for another method'
),
(
    'R52', 'return', 'payment of an RCK item stopped',
    60, 'calendar_days', 'never', false, null,
    'ask for another method'
),
(
    'R53', 'return', 'item and RCK entry presented',
    60, 'calendar_days', 'never', false, null,
    'do not debit again: it was paid'
),
(
    'R61', 'dishonored', 'dishonored: misrouted return',
    5, 'banking_days', 'never', false, null,
    'nothing'
),
(
    'R62', 'dishonored', 'dishonored: return of an erroneous or reversing debit',
    null, 'unknown', 'never', false, null,
    'nothing'
),
(
    'R67', 'dishonored', 'dishonored: duplicate return',
    5, 'banking_days', 'never', false, null,
    'nothing'
),
(
    'R68', 'dishonored', 'dishonored: untimely return',
    5, 'banking_days', 'never', false, null,
    'nothing'
),
(
    'R69', 'dishonored', 'dishonored: field errors',
    5, 'banking_days', 'never', false, null,
    'nothing'
),
(
    'R70', 'dishonored', 'dishonored: return was not requested',
    5, 'banking_days', 'never', false, null,
    'nothing'
),
(
    'R71', 'contested', 'contested: misrouted dishonored return',
    2, 'banking_days', 'never', false, null,
    'nothing'
),
(
    'R72', 'contested', 'contested: untimely dishonored return',
    2, 'banking_days', 'never', false, null,
    'nothing'
),
(
    'R73', 'contested', 'contested: the return was timely',
    2, 'banking_days', 'never', false, null,
    'nothing'
),
(
    'R74', 'contested', 'contested: corrected return',
    2, 'banking_days', 'never', false, null,
    'nothing'
),
(
    'R75', 'contested', 'contested: not a duplicate',
    2, 'banking_days', 'never', false, null,
    'nothing'
),
(
    'R76', 'contested', 'contested: no errors found',
    2, 'banking_days', 'never', false, null,
    'nothing'
),
(
    'R77', 'contested', 'contested: refusal of R62',
    null, 'unknown', 'never', false, null,
    'nothing'
),
(
    'R80', 'return', 'IAT coding error',
    2, 'banking_days', 'never', false, null,
    'none: such entries are not sent'
),
(
    'R81', 'return', 'not a participant in IAT',
    2, 'banking_days', 'never', false, null,
    'none: such entries are not sent'
),
(
    'R82', 'return', 'invalid foreign receiver''s bank',
    2, 'banking_days', 'never', false, null,
    'none: such entries are not sent'
),
(
    'R83', 'return', 'foreign bank is unable to settle',
    2, 'banking_days', 'never', false, null,
    'none: such entries are not sent'
),
(
    'R84', 'return', 'not processed by the gateway',
    2, 'banking_days', 'never', false, null,
    'none: such entries are not sent'
),
(
    'R85', 'return', 'miscoded outbound international payment',
    2, 'banking_days', 'never', false, null,
    'none: such entries are not sent'
);

create table surety.customer_calls (
    customer_id text collate "C" not null,
    operation text not null,
    idempotency_key text collate "C" not null,
    customer_version integer not null,
    first_sent_at timestamptz not null,
    last_sent_at timestamptz not null,
    sends integer not null default 1,
    answered_at timestamptz,
    status smallint,
    constraint customer_calls_pkey primary key (customer_id, operation),
    constraint customer_call_belongs_to_a_customer foreign key (customer_id) references surety.customers (id),
    constraint customer_call_operation_is_known check (
        operation in ('create_customer', 'update_customer')
        or operation ~ '^(save_method:pay|detach_method:spm)_[0-9a-f]{24}$'
    ),
    constraint customer_call_answer_has_a_status check (answered_at is not null or status is null)
);
comment on table surety.customer_calls is
'What we send to providers about customers, written before it is sent. The request itself is not stored: it follows from
the customer at customer_version. answered_at is null while the outcome is unknown.';

-- ------------------------------------------------------------------------------------------------------- payments

create table surety.payments (
    id text collate "C" not null,
    merchant_id text collate "C" not null,
    version integer not null,
    state text collate "C" not null,
    amount_minor bigint not null,
    currency text collate "C" not null,
    captured_minor bigint not null default 0,
    refunded_minor bigint not null default 0,
    refund_pending_minor bigint not null default 0,
    at_risk_minor bigint not null default 0,
    reversed_minor bigint not null default 0,
    rail text not null,
    capture_method text not null,
    method_token text not null,
    reference text collate "C",
    description text,
    statement_descriptor_suffix text,
    return_url text,
    off_session boolean not null default false,
    customer jsonb,
    metadata jsonb not null default '{}',
    provider text not null,
    provider_account text not null,
    livemode boolean not null,
    provider_id text collate "C",
    next_action jsonb,
    failure jsonb,
    flags jsonb not null default '{}',
    created_at timestamptz not null,
    updated_at timestamptz not null,
    poll_at timestamptz,
    poll_count integer not null default 0,
    fraud_warning jsonb,
    customer_id text collate "C",
    saved_method_id text collate "C",
    save_method jsonb,
    authentication text not null default 'redirect',
    constraint payments_pkey primary key (id),
    -- A bound within the pattern would cost thirty times as much.
    constraint payment_id_is_a_payment_id check (length(id) = 28 and id ~ '^pay_[0-9a-f]+$'),
    constraint payment_belongs_to_a_merchant foreign key (merchant_id, livemode)
    references surety.merchants (id, livemode),
    constraint payment_currency_is_known foreign key (currency) references surety.currencies (currency),
    constraint payment_amount_is_positive check (amount_minor > 0),
    constraint payment_rail_has_a_path check (
        rail = 'card' and capture_method in ('automatic', 'manual') or rail = 'ach' and capture_method = 'automatic'
    ),
    constraint captured_stays_within_amount check (captured_minor between 0 and amount_minor),
    constraint refunds_stay_within_captured check (
        refunded_minor >= 0 and refund_pending_minor >= 0 and refunded_minor + refund_pending_minor <= captured_minor
    ),
    constraint losses_are_not_negative check (at_risk_minor >= 0 and reversed_minor >= 0),
    constraint payment_reference_is_short check (char_length(reference) between 1 and 255),
    constraint payment_description_is_short check (char_length(description) between 1 and 1000),
    constraint payment_descriptor_suffix_is_short check (char_length(statement_descriptor_suffix) between 1 and 22),
    constraint payment_return_url_is_short check (char_length(return_url) between 1 and 2048),
    -- Otherwise a card's payer could not act.
    constraint payment_returns_its_payer check (
        rail <> 'card' or return_url is not null or off_session or authentication = 'script'
    ),
    constraint payment_authentication_is_known check (authentication in ('redirect', 'script')),
    constraint payment_by_script_keeps_its_payer check (
        authentication <> 'script' or (return_url is null and not off_session)
    ),
    constraint payment_metadata_is_an_object check (jsonb_typeof(metadata) = 'object'),
    constraint payment_customer_belongs_to_its_merchant foreign key (merchant_id, customer_id)
    references surety.customers (merchant_id, id),
    constraint payment_method_belongs_to_its_customer foreign key (customer_id, saved_method_id)
    references surety.payment_methods (customer_id, id),
    constraint payment_has_one_kind_of_customer check (customer_id is null or customer is null),
    constraint saved_method_has_a_customer check (
        customer_id is not null or (saved_method_id is null and save_method is null)
    )
) partition by range (id);
create index payments_of_a_merchant on surety.payments (merchant_id, id);
create index payments_in_a_state on surety.payments (merchant_id, state, id);
create index payments_by_reference on surety.payments (merchant_id, reference, id) where reference is not null;
create index payments_to_poll on surety.payments (poll_at) where poll_at is not null;
comment on table surety.payments is
'Payments. state and version project the last step; the amounts beside them, in minor units of currency, come from
facts. poll_at is when the provider is polled next. Changed only by inserting steps and recording facts.';
comment on column surety.payments.captured_minor is 'Captured, at most amount_minor; any more is a discrepancy.';
comment on column surety.payments.refunded_minor is 'Refunds that succeeded.';
comment on column surety.payments.refund_pending_minor is
'Refunds asked for and not ended; reserved from captured_minor.';
comment on column surety.payments.at_risk_minor is 'Withdrawn in disputes that are not decided.';
comment on column surety.payments.reversed_minor is 'Lost in disputes or returned.';
comment on column surety.payments.fraud_warning is
'The newest warning of the card''s issuer: {type, actionable, at}. It moves neither state nor money.';
comment on column surety.payments.customer_id is 'The stored customer. customer holds a payer who is given inline.';
comment on column surety.payments.saved_method_id is
'The saved payment method that is charged; method_token is its id at the provider.';
comment on column surety.payments.save_method is
'Saves the payment method once the payment has proved it: {usage, mandate}.';
comment on column surety.payments.authentication is
'How a payer who must act does so: redirect (the provider''s page, then return_url) or script (the provider''s script on
the merchant''s page, by the intent''s client secret).';
comment on column surety.payments.flags is
'What makes no step. Times: cancel_requested_at (the merchant asked), overdue_at (the payer did not act). hold: the row
of surety.payment_holds as merchants see it.';

create unlogged table surety.client_secret_requests (
    id text collate "C" not null,
    payment_id text collate "C" not null,
    merchant_id text collate "C" not null,
    public_key bytea not null,
    requested_at timestamptz not null,
    sealed bytea,
    failure text,
    constraint client_secret_requests_pkey primary key (id),
    constraint client_secret_request_has_a_public_key check (octet_length(public_key) = 32),
    constraint sealed_client_secret_is_short check (octet_length(sealed) between 1 and 1000),
    constraint client_secret_failure_is_known check (failure in ('ended', 'unanswered')),
    constraint client_secret_request_has_one_answer check (sealed is null or failure is null)
);
comment on table surety.client_secret_requests is
'Requests for client secrets that wait for a worker, for seconds. sealed is the secret, encrypted for public_key, whose
private key only the asking process holds, in memory. failure: ended (the payer need not act any more), unanswered. Not
in the write-ahead log: a crash of the server and a failover empty the table, and merchants ask again.';

create table surety.steps (
    payment_id text collate "C" not null,
    version integer not null,
    prior_version integer not null generated always as (version - 1) stored,
    from_state text collate "C",
    to_state text collate "C" not null,
    cause text not null,
    implied boolean not null default false,
    at timestamptz not null,
    actor text not null,
    request_id text collate "C",
    constraint steps_pkey primary key (payment_id, version),
    constraint step_end_can_be_referred_to unique (payment_id, version, to_state),
    constraint step_is_legal foreign key (from_state, to_state)
    references surety.transitions (from_state, to_state),
    constraint only_the_first_step_starts_nowhere check ((version = 1) = (from_state is null)),
    constraint step_version_is_positive check (version >= 1),
    constraint first_step_is_initiated check (version > 1 or to_state = 'initiated')
) partition by range (payment_id);
comment on table surety.steps is
'The source of truth about states: a chain of steps per payment. implied marks a mandatory step that no fact proves.';

-- Keys between tables that are partitioned alike. A row and what it refers to lie in the partitions of one month, so
-- each pair of partitions gets the key when it is made (surety.maintain_partitions). The claim is the same as that of a
-- key between the parents, at a third of its cost: those look through every partition for each row.
create table surety.sibling_keys (
    name text not null,
    child text not null,
    columns text not null,
    parent text not null,
    parent_columns text not null,
    is_deferred boolean not null default false,
    constraint sibling_keys_pkey primary key (name)
);
comment on table surety.sibling_keys is 'Foreign keys that every pair of same-month partitions has.';
insert into surety.sibling_keys (name, child, columns, parent, parent_columns, is_deferred) values
('step_belongs_to_a_payment', 'steps', 'payment_id', 'payments', 'id', false),
(
    'step_starts_where_the_last_ended', 'steps', 'payment_id, prior_version, from_state',
    'steps', 'payment_id, version, to_state', false
),
('payment_state_is_its_last_step', 'payments', 'id, version, state', 'steps', 'payment_id, version, to_state', true),
('call_belongs_to_a_payment', 'calls', 'payment_id', 'payments', 'id', false),
('fact_belongs_to_a_payment', 'facts', 'payment_id', 'payments', 'id', false),
('expectation_is_of_a_payment', 'expectations', 'payment_id', 'payments', 'id', false);

create table surety.calls (
    payment_id text collate "C" not null,
    operation text not null,
    idempotency_key text collate "C" not null,
    request text not null,
    first_sent_at timestamptz not null,
    last_sent_at timestamptz not null,
    sends integer not null default 1,
    answered_at timestamptz,
    status smallint,
    refused_through integer not null default 0,
    constraint calls_pkey primary key (payment_id, operation),
    constraint refused_sends_were_counted check (refused_through between 0 and sends),
    constraint call_operation_is_known check (
        operation in ('create', 'confirm', 'capture', 'cancel')
        or operation ~ '^(refund:ref|evidence:dp)_[0-9a-f]+(:[0-9]+)?$'
        or operation ~ '^cancel:[0-9A-Za-z_]+$'
    ),
    constraint call_answer_has_a_status check ((answered_at is null) = (status is null))
) partition by range (payment_id);
comment on table surety.calls is
'What we send to providers: the very bytes and key, written before they are sent, so that an unknown outcome can be
asked about with the same ones. answered_at is null while the outcome is unknown.';
comment on column surety.calls.refused_through is
'Each send up to this number was refused for want of access (401, 403), or not made after it was written. If that is all
of them, the provider has executed nothing.';

create table surety.call_verdicts (
    verdict text collate "C" not null,
    meaning text not null,
    constraint call_verdicts_pkey primary key (verdict)
);
comment on table surety.call_verdicts is
'What surety.begin_calls decides about the call of one event. jobs/handlers/calls.py matches all of them.';

insert into surety.call_verdicts (verdict, meaning) values
('send', 'send the request under its key'),
('ask', 'look for the effect of an earlier send; if it is absent, send the request again under the same key'),
('replace_key', 'look for an earlier send''s effect, unless a repeated call does no harm; send under a new key'),
('find', 'look for the effect of an earlier send; if it is absent, the payment ends: it was canceled meanwhile'),
('needs_customer', 'create the payment''s customer first, then plan the call again'),
('wait', 'an earlier call decides whether the provider holds the payment: try again later'),
('skip', 'nothing is left to do');

create type surety.planned_call as (
    event_id text,
    subject_id text,
    verdict text,
    operation text,
    idempotency_key text,
    request jsonb,
    provider_id text,
    last_sent_at timestamptz,
    payment surety.payments
);
comment on type surety.planned_call is
'One event''s call as surety.begin_calls writes it; made by surety.plan_call. subject_id is the payment, refund or
dispute; last_sent_at the time of the last send, null if there was none.';

create unlogged table surety.request_slots (
    provider text not null,
    account text not null,
    next_at timestamptz not null,
    constraint request_slots_pkey primary key (provider, account)
);
comment on table surety.request_slots is
'When each account''s next request to its provider may go out: one token bucket shared by all workers. Losing it loses
nothing.';

create table surety.circuit_breakers (
    provider text not null,
    account text not null,
    bucket_at timestamptz not null,
    answered integer not null default 0,
    failed integer not null default 0,
    prior_answered integer not null default 0,
    prior_failed integer not null default 0,
    consecutive_failures integer not null default 0,
    answered_at timestamptz,
    opened_at timestamptz,
    closed_at timestamptz,
    next_probe_at timestamptz,
    probes integer not null default 0,
    cause text,
    reason text,
    constraint circuit_breakers_pkey primary key (provider, account),
    constraint circuit_cause_is_known check (cause in ('outage', 'account_refused', 'key_refused')),
    constraint open_circuit_has_a_cause check ((opened_at is null) = (cause is null)),
    constraint platform_account_is_refused_by_its_key check (account <> '' or cause <> 'account_refused'),
    constraint open_circuit_is_probed check (
        (next_probe_at is null) = (opened_at is null or (cause = 'key_refused' and account <> ''))
    )
);
comment on table surety.circuit_breakers is
'Circuit breakers, one per provider''s account, open while opened_at is set. answered and failed count calls of the
bucket of 30 seconds that began at bucket_at, prior_* of the one before.';
create index circuits_of_refused_accounts on surety.circuit_breakers (provider, account)
where cause = 'account_refused';
comment on column surety.circuit_breakers.cause is
'Why it is open. outage: the provider does not answer; account_refused: it refuses us this account, other accounts not;
key_refused: it refuses our key, so all accounts are open, and the platform''s alone is probed for them.';
comment on column surety.circuit_breakers.reason is
'The error that opened it, with the provider''s words.';

-- --------------------------------------------------------------------------------------------------------- limits

create table surety.money_limits (
    merchant_id text collate "C" not null,
    currency text collate "C" not null,
    count_max bigint,
    amount_max_minor bigint,
    set_by text not null,
    set_at timestamptz not null,
    constraint money_limits_pkey primary key (merchant_id, currency),
    constraint money_limit_is_of_a_merchant foreign key (merchant_id) references surety.merchants (id),
    constraint money_limit_currency_is_known foreign key (currency) references surety.currencies (currency),
    constraint money_limit_bounds_something check (count_max is not null or amount_max_minor is not null),
    constraint money_limit_is_not_negative check (count_max >= 0 and amount_max_minor >= 0)
) with (fillfactor = 80);
comment on table surety.money_limits is
'How many payments, and how much in minor units, a merchant''s accepted payments in a currency may come to in a UTC day.
A null bounds nothing. The row''s lock serializes the transactions that accept payments under the limit.';

create table surety.accepted_money (
    merchant_id text collate "C" not null,
    currency text collate "C" not null,
    day date not null,
    payments bigint not null,
    amount_minor bigint not null,
    constraint accepted_money_pkey primary key (merchant_id, currency, day),
    constraint accepted_money_is_of_a_limit foreign key (merchant_id, currency)
    references surety.money_limits (merchant_id, currency) on delete cascade
) with (fillfactor = 50);
comment on table surety.accepted_money is
'The payments that were accepted under a money limit, by their UTC day: number and sum in minor units, whatever became
of them. Written under the lock of the limit''s row. A day that has no row yet is computed from the payments.';

create table surety.velocity_rules (
    id text collate "C" not null,
    merchant_id text collate "C",
    subject text not null,
    period interval not null,
    count_max bigint,
    amount_max_minor bigint,
    currency text collate "C",
    action text not null,
    created_by text not null,
    created_at timestamptz not null,
    removed_at timestamptz,
    constraint velocity_rules_pkey primary key (id),
    constraint velocity_rule_is_of_a_merchant foreign key (merchant_id) references surety.merchants (id),
    constraint velocity_currency_is_known foreign key (currency) references surety.currencies (currency),
    constraint velocity_subject_is_known check (subject in ('card', 'customer', 'email')),
    constraint velocity_action_is_known check (action in ('refuse', 'hold')),
    constraint velocity_period_is_bounded check (period between interval '1 second' and interval '90 days'),
    constraint velocity_rule_bounds_something check (count_max is not null or amount_max_minor is not null),
    constraint velocity_bound_is_not_negative check (count_max >= 0 and amount_max_minor >= 0),
    constraint velocity_amount_has_a_currency check (amount_max_minor is null or currency is not null)
);
create index velocity_rules_in_force on surety.velocity_rules (merchant_id) where removed_at is null;
comment on table surety.velocity_rules is
'How many payments of one subject (a payer''s e-mail address, a stored customer, the card of a saved payment method) a
merchant may accept within a period that ends with each new payment, and how much in minor units of currency. Without a
merchant a rule is for each merchant, whose payments count apart from those of others. With a currency it is about
payments in it alone. action: refuse or hold a payment beyond it.';

create table surety.payment_holds (
    payment_id text collate "C" not null,
    rule_id text collate "C" not null,
    detail jsonb not null,
    opened_at timestamptz not null,
    expires_at timestamptz not null,
    closed_at timestamptz,
    outcome text,
    closed_by text,
    reason text,
    constraint payment_holds_pkey primary key (payment_id),
    constraint hold_is_of_a_payment foreign key (payment_id) references surety.payments (id),
    constraint hold_follows_a_rule foreign key (rule_id) references surety.velocity_rules (id),
    constraint hold_outcome_is_known check (outcome in ('released', 'refused', 'expired', 'canceled', 'overtaken')),
    constraint closed_hold_has_an_outcome check (
        (closed_at is null) = (outcome is null) and (closed_at is null) = (closed_by is null)
    ),
    constraint hold_decision_has_a_reason check (outcome <> 'refused' or btrim(reason) <> '')
);
create index payment_holds_that_are_open on surety.payment_holds (expires_at) where closed_at is null;
comment on table surety.payment_holds is
'Accepted payments that a velocity rule holds: nothing is sent to the provider until an operator releases them. outcome:
released or refused by an operator, expired by time, canceled (the payment ended otherwise), overtaken (the provider
held it already). detail: what the rule found.';

-- -------------------------------------------------------------------------------------------------------- refunds

create table surety.refunds (
    id text collate "C" not null,
    payment_id text collate "C" not null,
    merchant_id text collate "C" not null,
    version integer not null default 1,
    state text collate "C" not null default 'pending',
    amount_minor bigint not null,
    currency text collate "C" not null,
    reason text,
    metadata jsonb not null default '{}',
    provider text not null,
    provider_account text not null,
    provider_id text collate "C",
    is_ours boolean not null,
    failure jsonb,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    poll_at timestamptz,
    poll_count integer not null default 0,
    constraint refunds_pkey primary key (id),
    constraint refund_id_is_a_refund_id check (length(id) = 28 and id ~ '^ref_[0-9a-f]+$'),
    constraint refund_belongs_to_a_payment foreign key (payment_id) references surety.payments (id),
    constraint refund_belongs_to_a_merchant foreign key (merchant_id) references surety.merchants (id),
    constraint refund_amount_is_positive check (amount_minor > 0),
    constraint refund_metadata_is_an_object check (jsonb_typeof(metadata) = 'object'),
    constraint providers_refund_is_one_refund unique (provider, provider_account, provider_id)
);
create index refunds_of_a_payment on surety.refunds (payment_id, id);
create index refunds_of_a_merchant on surety.refunds (merchant_id, id);
create index refunds_to_poll on surety.refunds (poll_at) where poll_at is not null;
comment on table surety.refunds is
'Refunds: those that merchants asked for (is_ours), and those that were made at the provider. amount_minor, in minor
units of currency, is taken up from the moment it is asked for. state and version project the last step.';

create table surety.refund_steps (
    refund_id text collate "C" not null,
    version integer not null,
    prior_version integer not null generated always as (version - 1) stored,
    from_state text collate "C",
    to_state text collate "C" not null,
    cause text not null,
    at timestamptz not null,
    actor text not null,
    request_id text collate "C",
    constraint refund_steps_pkey primary key (refund_id, version),
    constraint refund_step_end_can_be_referred_to unique (refund_id, version, to_state),
    constraint refund_step_belongs_to_a_refund foreign key (refund_id) references surety.refunds (id),
    constraint refund_step_is_legal foreign key (from_state, to_state)
    references surety.refund_transitions (from_state, to_state),
    constraint refund_step_starts_where_the_last_ended foreign key (refund_id, prior_version, from_state)
    references surety.refund_steps (refund_id, version, to_state),
    constraint only_the_first_refund_step_starts_nowhere check ((version = 1) = (from_state is null)),
    constraint refund_step_version_is_positive check (version >= 1),
    constraint first_refund_step_is_pending check (version > 1 or to_state = 'pending')
);
alter table surety.refunds add constraint refund_state_is_its_last_step foreign key (id, version, state)
references surety.refund_steps (refund_id, version, to_state) deferrable initially deferred;
comment on table surety.refund_steps is
'The source of truth about refunds'' states: a chain of steps per refund.';

-- ------------------------------------------------------------------------------------------------------- disputes

create table surety.disputes (
    id text collate "C" not null,
    payment_id text collate "C" not null,
    merchant_id text collate "C" not null,
    status text collate "C" not null,
    amount_minor bigint not null,
    withdrawn_minor bigint not null,
    currency text collate "C" not null,
    reason text,
    provider text not null,
    provider_account text not null,
    provider_id text collate "C" not null,
    version integer not null default 1,
    revision integer not null,
    evidence jsonb not null default '{}',
    evidence_revision integer not null default 0,
    evidence_due_at timestamptz,
    submit_asked_at timestamptz,
    evidence_failure jsonb,
    reminded_at timestamptz,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    poll_at timestamptz,
    constraint disputes_pkey primary key (id),
    constraint dispute_id_is_a_dispute_id check (length(id) = 27 and id ~ '^dp_[0-9a-f]+$'),
    constraint dispute_belongs_to_a_payment foreign key (payment_id) references surety.payments (id),
    constraint dispute_belongs_to_a_merchant foreign key (merchant_id) references surety.merchants (id),
    constraint dispute_amount_is_positive check (amount_minor > 0),
    constraint dispute_withdrawal_is_not_negative check (withdrawn_minor >= 0),
    constraint dispute_evidence_is_an_object check (jsonb_typeof(evidence) = 'object'),
    constraint providers_dispute_is_one_dispute unique (provider, provider_account, provider_id)
);
create index disputes_of_a_payment on surety.disputes (payment_id, id);
create index disputes_of_a_merchant on surety.disputes (merchant_id, id);
create index disputes_to_poll on surety.disputes (poll_at) where poll_at is not null;
create index disputes_to_remind_of on surety.disputes (evidence_due_at) where reminded_at is null;
comment on table surety.disputes is
'Disputes and inquiries as of their last fetch (revision). Any status that the provider may publish has a place; facts
say what it means for money. evidence is what the merchant gave, merged.';
comment on column surety.disputes.evidence_failure is
'Why the evidence given last was not taken: {code, message}. It is open again.';
comment on column surety.disputes.amount_minor is 'The amount disputed, in minor units of currency.';
comment on column surety.disputes.withdrawn_minor is
'What the network holds or keeps of it, in minor units of currency.';

-- ---------------------------------------------------------------------------------------------------------- facts

create table surety.provider_events (
    id text collate "C" not null,
    provider text not null,
    account text not null,
    livemode boolean not null,
    event_id text collate "C" not null,
    type text not null,
    headers jsonb not null,
    body text not null,
    received_at timestamptz not null,
    constraint provider_events_pkey primary key (id)
) partition by range (id);
comment on table surety.provider_events is
'The provider''s events, each once: webhooks with a valid signature, and events read from its list (without headers).
body is the event''s text without client secrets.';

create table surety.erasures (
    subject_id text collate "C" not null,
    begun_at timestamptz not null,
    ended_at timestamptz,
    constraint erasures_pkey primary key (subject_id)
);
comment on table surety.erasures is
'Payments and customers whose data are erased. What a provider reports about them is stored without such data,
also if a payment is in progress again since ended_at: by a dispute.';

create table surety.provider_event_keys (
    provider text not null,
    account text not null,
    event_id text collate "C" not null,
    provider_event_id text collate "C" not null,
    constraint provider_event_keys_pkey primary key (provider, account, event_id)
);
comment on table surety.provider_event_keys is
'Ids of all provider events ever received, by which a repeated webhook is recognized.';

create table surety.rejected_webhooks (
    id text collate "C" not null,
    provider text not null,
    reason text not null,
    headers jsonb not null,
    body bytea not null,
    body_bytes integer not null,
    received_at timestamptz not null,
    constraint rejected_webhooks_pkey primary key (id),
    constraint rejected_body_is_bounded check (length(body) <= 4096)
);
comment on table surety.rejected_webhooks is
'Webhooks whose signature is invalid, and signed ones that are no events. Bodies are cut to 4096 bytes; the newest
thousand are kept.';

create table surety.provider_objects (
    provider text not null,
    account text not null,
    object_id text collate "C" not null,
    payment_id text collate "C" not null,
    constraint provider_objects_pkey primary key (provider, account, object_id)
);
comment on table surety.provider_objects is 'Which payment a provider''s object (pi_, ch_, re_, dp_, txn_) belongs to.';

create table surety.fact_keys (
    provider text not null,
    account text not null,
    livemode boolean not null,
    object_id text collate "C" not null,
    kind text collate "C" not null,
    revision integer not null default 0,
    fact_id text collate "C" not null,
    constraint fact_keys_pkey primary key (provider, account, livemode, object_id, kind, revision),
    constraint fact_kind_is_known foreign key (kind) references surety.fact_kinds (kind)
);
comment on table surety.fact_keys is
'Keys of all facts ever recorded. Neither amount, time nor source is part of the key, so a webhook and a poll about one
object are one fact. revision numbers the fetches of disputes, which can go back and forth, and the requests to capture
a payment, one of which may follow a refused one; elsewhere it is 0.';

create sequence surety.fetch_numbers as integer;
comment on sequence surety.fetch_numbers is
'Numbers the fetches of disputes. No two have the same number, so that one of any two is the last.';

create table surety.facts (
    id text collate "C" not null,
    payment_id text collate "C" not null,
    provider text not null,
    account text not null,
    livemode boolean not null,
    object_id text collate "C" not null,
    kind text collate "C" not null,
    revision integer not null default 0,
    amount_minor bigint,
    currency text collate "C",
    data jsonb not null default '{}',
    source text not null,
    source_id text collate "C",
    disregarded text,
    occurred_at timestamptz,
    recorded_at timestamptz not null,
    constraint facts_pkey primary key (payment_id, id),
    constraint fact_source_is_known check (source in ('response', 'webhook', 'poll', 'file', 'operator', 'request'))
) partition by range (payment_id);
-- The state and amounts that follow from a payment's facts, in minor units: surety.derive_payments returns it.
create type surety.derived as (
    payment_id text,
    target_state text,
    captured_minor bigint,
    excess_minor bigint,
    refunded_minor bigint,
    refund_pending_minor bigint,
    over_refunded_minor bigint,
    at_risk_minor bigint,
    reversed_minor bigint,
    is_settled boolean,
    is_lost boolean,
    evidenced text [],
    provider_id text,
    next_action jsonb,
    failure jsonb
);
comment on table surety.facts is
'What providers asserted about payments; a payment''s state is a function of these rows. amount_minor is in minor units
of currency. disregarded says why a fact doesn''t count (another account, mode, currency or amount): it opened a
discrepancy.';

create table surety.unmatched_facts (
    id text collate "C" not null,
    provider text not null,
    account text not null,
    livemode boolean not null,
    object_id text collate "C" not null,
    kind text collate "C" not null,
    revision integer not null default 0,
    fact jsonb not null,
    recorded_at timestamptz not null,
    ended_at timestamptz,
    ended_as text,
    constraint unmatched_facts_pkey primary key (id),
    constraint unmatched_fact_has_the_mode_of_its_database foreign key (livemode)
    references surety.environment (livemode),
    constraint unmatched_fact_ends_as_something check ((ended_at is null) = (ended_as is null)),
    constraint unmatched_fact_ending_is_known check (ended_as in ('matched', 'without_payment', 'foreign',
        'missing_here')),
    constraint unmatched_fact_is_stored_once unique (provider, account, livemode, object_id, kind, revision)
);
create index unmatched_facts_waiting on surety.unmatched_facts (recorded_at) where ended_at is null;
comment on table surety.unmatched_facts is
'Facts without a payment. A fact whose payment is not known yet is matched again for 15 minutes. Then it ends as
foreign, or as missing_here, a critical discrepancy, if it carries our environment''s metadata. Payouts and the
provider''s own fees end as without_payment.';

create table surety.pending_money (
    provider text not null,
    account text not null,
    object_id text collate "C" not null,
    created_at timestamptz not null,
    available_at timestamptz not null,
    poll_count integer not null default 0,
    constraint pending_money_pkey primary key (provider, account, object_id)
);
create index pending_money_by_time on surety.pending_money (available_at);
comment on table surety.pending_money is
'Balance transactions whose money is not available yet: polled from available_at on.';

-- -------------------------------------------------------------------------------------------------------- payouts

create table surety.payout_statuses (
    status text collate "C" not null,
    rank smallint not null,
    is_failure boolean not null,
    poll_after interval,
    meaning text not null,
    constraint payout_statuses_pkey primary key (status)
);
comment on table surety.payout_statuses is
'Statuses of payouts. The highest rank that was reported stands, whatever the order of reports. poll_after: the time
after which a payout is fetched again, null for never. A status without a row is stored too, with the lowest rank.';

insert into surety.payout_statuses (status, rank, is_failure, poll_after, meaning) values
('pending', 1, false, '1 hour', 'the provider has not sent it to the bank yet'),
('in_transit', 2, false, '1 hour', 'it is on its way to the bank'),
('paid', 3, false, '12 hours', 'the provider counts it as arrived; it may still fail'),
('canceled', 4, true, null, 'it was canceled before it was sent; the money is back in the balance'),
('failed', 4, true, null, 'the bank refused it; the money is back in the balance');

create table surety.payouts (
    provider text not null,
    account text not null,
    id text collate "C" not null,
    livemode boolean not null,
    amount_minor bigint not null,
    currency text collate "C" not null,
    status text collate "C" not null,
    was_paid boolean not null,
    is_automatic boolean,
    reconciliation_status text,
    trace_id text,
    arrival_on date,
    failure_code text,
    created_at timestamptz not null,
    recorded_at timestamptz not null,
    poll_at timestamptz,
    lines_due_at timestamptz,
    lines_read_at timestamptz,
    line_count integer,
    lines_minor bigint,
    expected_minor bigint not null generated always as (
        case when status in ('failed', 'canceled') then 0 else amount_minor end
    ) stored,
    matched_minor bigint not null default 0,
    constraint payouts_pkey primary key (provider, account, id),
    constraint payout_has_the_mode_of_its_database foreign key (livemode)
    references surety.environment (livemode),
    constraint payout_lines_are_summed_when_read check (
        (lines_read_at is null) = (line_count is null) and (lines_read_at is null) = (lines_minor is null)
    )
);
create index payouts_by_time on surety.payouts (created_at);
create index payouts_not_at_bank on surety.payouts (currency, arrival_on) where expected_minor <> matched_minor;
create index payouts_to_poll on surety.payouts (poll_at) where poll_at is not null;
create index payouts_to_read on surety.payouts (lines_due_at) where lines_due_at is not null;
comment on table surety.payouts is
'What the provider pays out from our balance to our bank, as last reported. amount_minor is signed: a negative payout
takes money from the bank. was_paid: it was reported as paid, perhaps before it failed. trace_id is the banks''
reference to it. lines_due_at: when its balance transactions are to be read; lines_minor is the sum of their nets. The
bank should show expected_minor; matched_minor is the sum of the bank''s lines that were matched to it.';

create table surety.payout_lines (
    provider text not null,
    account text not null,
    line_id text collate "C" not null,
    payout_id text collate "C" not null,
    category text not null,
    net_minor bigint not null,
    currency text collate "C" not null,
    constraint payout_lines_pkey primary key (provider, account, line_id),
    constraint payout_line_is_in_a_payout foreign key (provider, account, payout_id)
    references surety.payouts (provider, account, id)
);
create index payout_lines_of_a_payout on surety.payout_lines (provider, account, payout_id, line_id);
comment on table surety.payout_lines is
'Which balance transactions (txn_) a payout pays out. Each is in one payout. Their payments are in provider_objects.';

-- ------------------------------------------------------------------------------------------------ bank statements

create table surety.bank_accounts (
    id text collate "C" not null,
    digest text not null,
    hint text not null,
    bank text not null,
    currency text collate "C" not null,
    provider_account text not null default '',
    payer_text text,
    created_at timestamptz not null,
    constraint bank_accounts_pkey primary key (id),
    constraint bank_account_is_known_once unique (digest, currency)
);
comment on table surety.bank_accounts is
'Our accounts at banks, one row per currency. The number is stored as a digest and its last four characters (hint). The
provider''s account provider_account pays out to it. payer_text: only lines with these words are the provider''s;
null if all are.';

create table surety.bank_files (
    id text collate "C" not null,
    digest text not null,
    name text not null,
    format text not null,
    statement_count integer not null,
    line_count integer not null,
    new_line_count integer not null,
    refused_count integer not null,
    skipped_count integer not null,
    imported_by text not null,
    imported_at timestamptz not null,
    constraint bank_files_pkey primary key (id),
    constraint bank_file_is_imported_once unique (digest),
    constraint bank_file_format_is_known check (format in ('camt.053', 'bai2', 'csv'))
);
comment on table surety.bank_files is
'Imported files of bank statements. digest is the SHA-256 of the content. line_count counts lines that can be read, of
which new_line_count were not known; refused entries are in refused_bank_entries; skipped ones are not booked yet.';

create table surety.bank_statements (
    id text collate "C" not null,
    account_id text collate "C" not null,
    file_id text collate "C" not null,
    reference text not null,
    page integer,
    sequence bigint,
    from_on date,
    to_on date,
    opening_minor bigint,
    closing_minor bigint,
    line_count integer not null,
    lines_minor bigint not null,
    imported_at timestamptz not null,
    constraint bank_statements_pkey primary key (id),
    constraint bank_statement_is_of_an_account foreign key (account_id) references surety.bank_accounts (id),
    constraint bank_statement_came_in_a_file foreign key (file_id) references surety.bank_files (id),
    constraint bank_statement_is_kept_once unique nulls not distinct (account_id, reference, page, from_on, to_on)
);
create index bank_statements_by_day on surety.bank_statements (account_id, to_on);
comment on table surety.bank_statements is
'Statements of bank accounts, as first imported. from_on and to_on are the days that it says it covers, else those of
its lines. lines_minor is the sum of the lines that it has, known ones included.';

create table surety.bank_lines (
    id text collate "C" not null,
    account_id text collate "C" not null,
    statement_id text collate "C" not null,
    digest bytea not null,
    ordinal integer not null,
    place integer not null,
    part integer not null,
    booked_on date not null,
    value_on date,
    amount_minor bigint not null,
    currency text collate "C" not null,
    bank_reference text not null,
    reference_words text[] not null,
    description text not null,
    code text not null,
    is_reversal boolean not null,
    state text not null,
    constraint bank_lines_pkey primary key (id),
    constraint bank_line_is_of_a_statement foreign key (statement_id) references surety.bank_statements (id),
    constraint bank_line_is_kept_once unique (account_id, digest, ordinal),
    constraint bank_line_state_is_known check (state in ('new', 'unmatched', 'matched', 'other'))
);
create index bank_lines_of_a_statement on surety.bank_lines (statement_id, place, part);
create index bank_lines_without_payout on surety.bank_lines (account_id, amount_minor)
where state in ('new', 'unmatched');
comment on table surety.bank_lines is
'Amounts that banks booked, in minor units, positive if money arrived. digest identifies the content and ordinal
distinguishes equal ones, so that a line that comes in two statements is kept once. reference_words are the references
and the words of the description that may be some. state: new (not looked at yet), unmatched, matched, other (not the
provider''s).';

create table surety.bank_line_payouts (
    line_id text collate "C" not null,
    provider text not null,
    account text not null,
    payout_id text collate "C" not null,
    amount_minor bigint not null,
    matched_by text not null,
    matched_at timestamptz not null,
    constraint bank_line_payouts_pkey primary key (line_id, provider, account, payout_id),
    constraint matched_line_is_known foreign key (line_id) references surety.bank_lines (id),
    constraint matched_payout_is_known foreign key (provider, account, payout_id)
    references surety.payouts (provider, account, id),
    constraint match_rule_is_known check (matched_by in ('trace_id', 'amount', 'several_payouts', 'several_lines'))
);
create index bank_lines_of_a_payout on surety.bank_line_payouts (provider, account, payout_id);
comment on table surety.bank_line_payouts is
'Which payouts a bank''s line pays, with the amount of each: a line may pay several payouts, a payout may come in
several lines.';

create table surety.refused_bank_entries (
    file_id text collate "C" not null,
    place integer not null,
    field text not null,
    value text not null,
    rule text not null,
    constraint refused_bank_entries_pkey primary key (file_id, place, field),
    constraint refused_entry_came_in_a_file foreign key (file_id) references surety.bank_files (id)
);
comment on table surety.refused_bank_entries is
'Entries of bank files that are no lines: the number of the entry or record, the field, its value, the rule it breaks.';

create table surety.csv_mappings (
    name text not null,
    columns jsonb not null,
    set_by text not null,
    set_at timestamptz not null,
    constraint csv_mappings_pkey primary key (name),
    constraint csv_mapping_name_is_short check (name ~ '^[a-z0-9][a-z0-9_-]{0,62}$')
);
comment on table surety.csv_mappings is
'Named mappings of the columns of banks'' CSV files.';

create table surety.report_files (
    id text collate "C" not null,
    digest text not null,
    name text not null,
    kind text not null,
    account text not null,
    from_at timestamptz,
    to_at timestamptz,
    row_count integer not null,
    refused_count integer not null,
    difference_count integer not null,
    missing_here_count integer not null,
    missing_at_provider_count integer not null,
    imported_by text not null,
    imported_at timestamptz not null,
    constraint report_files_pkey primary key (id),
    constraint report_file_is_compared_once unique (digest, account),
    constraint report_file_kind_is_known check (kind in ('balance', 'payout_reconciliation', 'payouts'))
);
comment on table surety.report_files is
'Reports of the provider that were compared with our records. digest is the SHA-256 of the content. from_at and to_at
bound the compared time. The counts are of rows: readable, refused, different, unknown here, absent in the report.';

create table surety.refused_report_rows (
    file_id text collate "C" not null,
    line integer not null,
    field text not null,
    value text not null,
    rule text not null,
    constraint refused_report_rows_pkey primary key (file_id, line),
    constraint refused_row_came_in_a_file foreign key (file_id) references surety.report_files (id)
);
comment on table surety.refused_report_rows is
'Rows of reports that are not compared: the line of the file, the column, its value, the rule that it breaks.';

create unlogged table surety.staged_report_rows (
    line integer not null,
    id text collate "C" not null,
    currency text collate "C" not null,
    gross_minor bigint not null,
    fee_minor bigint not null,
    net_minor bigint not null,
    category text not null,
    at timestamptz not null,
    payout_id text collate "C",
    status text,
    trace_id text,
    arrival_on date
);
comment on table surety.staged_report_rows is
'The rows of a report while it is compared, in one transaction; empty otherwise.';

create unlogged table surety.staged_bank_lines (
    statement integer not null,
    place integer not null,
    part integer not null,
    booked_on date not null,
    value_on date,
    amount_minor bigint not null,
    currency text collate "C" not null,
    bank_reference text not null,
    reference_words text[] not null,
    description text not null,
    code text not null,
    is_reversal boolean not null
);
comment on table surety.staged_bank_lines is
'The lines of a file while it is imported, in one transaction; empty otherwise.';

create unlogged table surety.staged_bank_refusals (
    place integer not null,
    field text not null,
    value text not null,
    rule text not null,
    subject text collate "C" not null
);
comment on table surety.staged_bank_refusals is
'The refused entries of a file, of a bank or of the provider, while it is imported, in one transaction; empty
otherwise.';

-- --------------------------------------------------------------------------------------------------------- ledger

create table ledger.account_kinds (
    kind text collate "C" not null,
    owner text not null,
    normal_side text not null,
    keeps_balance boolean not null,
    meaning text not null,
    constraint account_kinds_pkey primary key (kind),
    constraint account_owner_is_known check (owner in ('merchant', 'provider', 'platform')),
    constraint account_side_is_known check (normal_side in ('debit', 'credit')),
    constraint only_merchants_balances_are_kept check (keeps_balance = (owner = 'merchant'))
);
comment on table ledger.account_kinds is
'The chart of accounts.';

insert into ledger.account_kinds (kind, owner, normal_side, keeps_balance, meaning) values
('provider_receivable', 'provider', 'debit', false, 'the provider owes us: captured, not yet in its balance'),
('provider_balance', 'provider', 'debit', false, 'our balance at Stripe, pending and available'),
('in_transit', 'provider', 'debit', false, 'paid out, not yet at the bank'),
('bank', 'provider', 'debit', false, 'at the bank'),
('withheld_by_network', 'provider', 'debit', false, 'withheld by the network in a dispute'),
('ach_clearing', 'provider', 'debit', false, 'ACH clearing'),
('reserved', 'provider', 'debit', false, 'held by the provider as a reserve'),
('pending', 'merchant', 'credit', true, 'owed to the merchant, not yet settled'),
('available', 'merchant', 'credit', true, 'owed to the merchant, settled; may go negative'),
('disputed', 'merchant', 'credit', true, 'the merchant''s, held back in a dispute'),
('reserved_for_refunds', 'merchant', 'credit', true, 'on its way back to payers'),
('reserved_for_payouts', 'merchant', 'credit', true, 'on its way to the merchant'),
('fee_revenue', 'platform', 'credit', false, 'our fees'),
('provider_cost', 'platform', 'debit', false, 'the provider''s fees'),
('suspense', 'platform', 'credit', false, 'money without an explanation'),
('currency_exchange', 'platform', 'credit', false, 'currency exchange, one per currency');

create table ledger.rules (
    rule text collate "C" not null,
    leg smallint not null,
    debit text collate "C" not null,
    credit text collate "C" not null,
    amount text not null,
    constraint rules_pkey primary key (rule, leg),
    constraint rule_debits_an_account_kind foreign key (debit) references ledger.account_kinds (kind),
    constraint rule_credits_an_account_kind foreign key (credit) references ledger.account_kinds (kind),
    constraint rule_moves_between_two_accounts check (debit <> credit),
    constraint rule_amount_is_known check (
        amount in ('gross', 'fee', 'net', 'platform_fee', 'excess', 'other_gross', 'other_net')
    )
);
comment on table ledger.rules is
'Which transfers each rule makes: per leg a debit, a credit and an amount of the ledger.entry. gross, fee and net are
those of the provider''s record, and a negative one moves the other way. platform_fee is our fee. other_* are in the
payment''s currency where the record is in another one. *_ach are for payments that a bank carries, not Stripe.';

insert into ledger.rules (rule, leg, debit, credit, amount) values
('captured', 1, 'provider_receivable', 'pending', 'gross'),
('captured', 2, 'pending', 'fee_revenue', 'platform_fee'),
('captured', 3, 'provider_receivable', 'suspense', 'excess'),
('captured_ach', 1, 'ach_clearing', 'pending', 'gross'),
('captured_ach', 2, 'pending', 'fee_revenue', 'platform_fee'),
('captured_ach', 3, 'ach_clearing', 'suspense', 'excess'),
('charge', 1, 'provider_balance', 'provider_receivable', 'gross'),
('charge', 2, 'provider_cost', 'provider_balance', 'fee'),
('charge_exchanged', 1, 'currency_exchange', 'provider_receivable', 'other_gross'),
('charge_exchanged', 2, 'provider_balance', 'currency_exchange', 'gross'),
('charge_exchanged', 3, 'provider_cost', 'provider_balance', 'fee'),
('charge_failure', 1, 'provider_balance', 'provider_receivable', 'gross'),
('charge_failure', 2, 'provider_cost', 'provider_balance', 'fee'),
('ach_credit', 1, 'bank', 'ach_clearing', 'gross'),
('ach_credit', 2, 'provider_cost', 'bank', 'fee'),
('ach_return', 1, 'bank', 'ach_clearing', 'gross'),
('ach_return', 2, 'provider_cost', 'bank', 'fee'),
('settled', 1, 'pending', 'available', 'net'),
('settled_exchanged', 1, 'pending', 'currency_exchange', 'other_net'),
('settled_exchanged', 2, 'currency_exchange', 'available', 'net'),
('return', 1, 'available', 'provider_receivable', 'gross'),
('return_ach', 1, 'available', 'ach_clearing', 'gross'),
('refund_asked', 1, 'available', 'reserved_for_refunds', 'gross'),
('refund_failed', 1, 'reserved_for_refunds', 'available', 'gross'),
('refund', 1, 'provider_balance', 'reserved_for_refunds', 'gross'),
('refund', 2, 'provider_cost', 'provider_balance', 'fee'),
('refund_failure', 1, 'provider_balance', 'reserved_for_refunds', 'gross'),
('refund_failure', 2, 'provider_cost', 'provider_balance', 'fee'),
('refund_exchanged', 1, 'available', 'reserved_for_refunds', 'other_gross'),
('refund_exchanged', 2, 'provider_balance', 'available', 'gross'),
('refund_exchanged', 3, 'provider_cost', 'provider_balance', 'fee'),
('refund_ach', 1, 'bank', 'reserved_for_refunds', 'gross'),
('refund_ach', 2, 'provider_cost', 'bank', 'fee'),
('dispute_opened', 1, 'available', 'disputed', 'gross'),
('dispute_won', 1, 'disputed', 'available', 'gross'),
('dispute_lost', 1, 'disputed', 'withheld_by_network', 'gross'),
('dispute_reinstated', 1, 'withheld_by_network', 'available', 'gross'),
('dispute_appealed', 1, 'withheld_by_network', 'disputed', 'gross'),
('dispute', 1, 'provider_balance', 'withheld_by_network', 'gross'),
('dispute', 2, 'provider_cost', 'provider_balance', 'fee'),
('dispute', 3, 'available', 'fee_revenue', 'fee'),
('dispute_reversal', 1, 'provider_balance', 'withheld_by_network', 'gross'),
('dispute_reversal', 2, 'provider_cost', 'provider_balance', 'fee'),
('dispute_reversal', 3, 'available', 'fee_revenue', 'fee'),
('dispute_exchanged', 1, 'available', 'withheld_by_network', 'other_gross'),
('dispute_exchanged', 2, 'provider_balance', 'available', 'gross'),
('dispute_exchanged', 3, 'provider_cost', 'provider_balance', 'fee'),
('dispute_exchanged', 4, 'available', 'fee_revenue', 'fee'),
('payout', 1, 'provider_balance', 'in_transit', 'gross'),
('payout_reversal', 1, 'provider_balance', 'in_transit', 'gross'),
('bank_line', 1, 'bank', 'in_transit', 'gross'),
('provider_fee', 1, 'provider_balance', 'provider_cost', 'net'),
('bank_fee', 1, 'bank', 'provider_cost', 'net'),
('reserve', 1, 'provider_balance', 'reserved', 'net'),
('foreign', 1, 'provider_balance', 'suspense', 'net'),
('foreign_bank', 1, 'bank', 'suspense', 'net'),
('merchant_payout_asked', 1, 'available', 'reserved_for_payouts', 'gross'),
('merchant_payout_canceled', 1, 'reserved_for_payouts', 'available', 'gross'),
('merchant_payout_left', 1, 'reserved_for_payouts', 'bank', 'gross'),
('merchant_payout_returned', 1, 'bank', 'available', 'gross');

-- One cause that moves money, as ledger.post takes it; made by the function ledger.entry. Amounts are minor units of
-- currency, other_* of other_currency.
create type ledger.entry as (
    cause text,
    rule text,
    payment_id text,
    merchant_id text,
    provider_owner text,
    currency text,
    gross bigint,
    fee bigint,
    net bigint,
    platform_fee bigint,
    excess bigint,
    other_currency text,
    other_gross bigint,
    other_net bigint
);

create table ledger.accounts (
    id text collate "C" not null,
    kind text collate "C" not null,
    owner_id text collate "C" not null,
    currency text collate "C" not null,
    constraint accounts_pkey primary key (id),
    constraint account_kind_is_known foreign key (kind) references ledger.account_kinds (kind),
    constraint account_id_is_kind_owner_and_currency check (id = kind || ':' || owner_id || ':' || currency),
    constraint account_currency_can_be_referred_to unique (id, currency)
);
comment on table ledger.accounts is
'Accounts, created when first used. The id is kind:owner:currency; the owner is a merchant''s id, a provider''s account
or platform.';

create table ledger.postings (
    id text collate "C" not null,
    cause text collate "C" not null,
    rule text collate "C" not null,
    payment_id text collate "C",
    merchant_id text collate "C",
    at timestamptz not null,
    constraint postings_pkey primary key (id),
    constraint cause_posts_once unique (cause)
);
create index postings_of_a_merchant on ledger.postings (merchant_id, id) where merchant_id is not null;
create index postings_of_a_payment on ledger.postings (payment_id, id) where payment_id is not null;
comment on table ledger.postings is
'One row per cause that moved money; cause names the provider''s object or the payment, and what happened to it. rule is
the rule of ledger.rules that made its transfers.';

create table ledger.transfers (
    posting_id text collate "C" not null,
    leg smallint not null,
    debit_account text collate "C" not null,
    credit_account text collate "C" not null,
    amount_minor bigint not null,
    currency text collate "C" not null,
    constraint transfers_pkey primary key (posting_id, leg),
    constraint transfer_belongs_to_a_posting foreign key (posting_id) references ledger.postings (id),
    constraint transfer_debits_an_account_in_its_currency foreign key (debit_account, currency)
    references ledger.accounts (id, currency),
    constraint transfer_credits_an_account_in_its_currency foreign key (credit_account, currency)
    references ledger.accounts (id, currency),
    constraint transfer_moves_a_positive_amount check (amount_minor > 0),
    constraint transfer_moves_between_two_accounts check (debit_account <> credit_account)
) partition by range (posting_id);
comment on table ledger.transfers is
'Double entry by construction: one account debited, one credited, one positive amount in minor units.';

create table ledger.balances (
    account_id text collate "C" not null,
    balance_minor bigint not null,
    constraint balances_pkey primary key (account_id),
    constraint balance_is_of_an_account foreign key (account_id) references ledger.accounts (id)
);
comment on table ledger.balances is
'Credits minus debits of merchants'' accounts, in minor units. Written last in a transaction, in sorted order.';

create table ledger.final_postings (
    singleton boolean not null default true,
    ends_at timestamptz not null,
    end_id text collate "C" not null,
    summed_to timestamptz not null,
    constraint final_postings_pkey primary key (singleton),
    constraint final_postings_are_one_row check (singleton),
    constraint final_postings_end_with_a_day check (
        date_trunc('day', ends_at, 'UTC') = ends_at and date_trunc('day', summed_to, 'UTC') = summed_to
    ),
    constraint only_final_postings_are_summed check (summed_to <= ends_at)
);
comment on table ledger.final_postings is
'One row: no posting with an earlier time than ends_at is ever added; end_id is the lower bound of the ids from then on.
ledger.daily_balances has the days before summed_to. Both times are the beginning of a UTC day.';
insert into ledger.final_postings (ends_at, end_id, summed_to)
values ('1970-01-01T00:00:00Z', 'pst_', '1970-01-01T00:00:00Z');

create table ledger.daily_balances (
    account_id text collate "C" not null,
    day date not null,
    balance_minor bigint not null,
    constraint daily_balances_pkey primary key (account_id, day),
    constraint daily_balance_is_of_an_account foreign key (account_id) references ledger.accounts (id)
);
comment on table ledger.daily_balances is
'Credits minus debits of all accounts at the end of a UTC day, in minor units, append-only: a row for each account and
day with transfers. The last row before a time holds until that time''s day.';

create table ledger.closed_months (
    month date not null,
    closed_at timestamptz not null,
    closed_by text not null,
    findings jsonb not null,
    constraint closed_months_pkey primary key (month),
    constraint closed_month_begins_with_its_first_day check (extract(day from month) = 1),
    constraint month_is_closed_after_its_end check (closed_at >= (month + interval '1 month') at time zone 'UTC')
);
comment on table ledger.closed_months is
'Months whose books are closed, in their order, append-only. findings counts what was open at that time, by kind.';

create table ledger.closed_balances (
    month date not null,
    account_id text collate "C" not null,
    balance_minor bigint not null,
    constraint closed_balances_pkey primary key (month, account_id),
    constraint closed_balance_is_of_a_closed_month foreign key (month) references ledger.closed_months (month),
    constraint closed_balance_is_of_an_account foreign key (account_id) references ledger.accounts (id)
);
comment on table ledger.closed_balances is
'Credits minus debits of all accounts at the end of a closed month, in minor units, append-only.';

-- ----------------------------------------------------------------------------------------------- merchant payouts

create table surety.merchant_payout_terms (
    merchant_id text collate "C" not null,
    currency text collate "C" not null,
    schedule text not null default 'manual',
    minimum_minor bigint not null default 1,
    reserve_basis_points integer not null default 0,
    reserve_days integer not null default 0,
    set_by text not null,
    set_at timestamptz not null,
    constraint merchant_payout_terms_pkey primary key (merchant_id, currency),
    constraint merchant_payout_terms_are_of_a_merchant foreign key (merchant_id) references surety.merchants (id),
    constraint merchant_payout_terms_currency_is_known foreign key (currency) references surety.currencies (currency),
    constraint merchant_payout_schedule_is_known check (schedule in ('manual', 'daily', 'weekly', 'monthly')),
    constraint merchant_payout_minimum_is_positive check (minimum_minor > 0),
    constraint merchant_payout_reserve_is_a_part check (reserve_basis_points between 0 and 10000),
    constraint merchant_payout_reserve_has_days check (
        reserve_days between 0 and 365 and (reserve_basis_points = 0) = (reserve_days = 0)
    )
);
comment on table surety.merchant_payout_terms is
'When merchants are paid out, per currency: the schedule, the smallest amount in minor units, and the part of the money
settled within the last reserve_days that stays here. Without a row a payout is made by hand only.';

create table surety.merchant_payouts (
    id text collate "C" not null,
    merchant_id text collate "C" not null,
    currency text collate "C" not null,
    amount_minor bigint not null,
    schedule text not null,
    period_begins date not null,
    state text not null default 'asked',
    created_at timestamptz not null,
    created_by text not null,
    sent_at timestamptz,
    proof text,
    ended_at timestamptz,
    reason text,
    constraint merchant_payouts_pkey primary key (id),
    constraint merchant_payout_id_is_a_payout_id check (id ~ '^mpo_[0-9a-f]{24}$'),
    constraint merchant_payout_belongs_to_a_merchant foreign key (merchant_id) references surety.merchants (id),
    constraint merchant_payout_currency_is_known foreign key (currency) references surety.currencies (currency),
    constraint merchant_payout_amount_is_positive check (amount_minor > 0),
    constraint merchant_payout_schedule_was_known check (schedule in ('manual', 'daily', 'weekly', 'monthly')),
    constraint merchant_payout_state_is_known check (state in ('asked', 'left', 'returned', 'canceled')),
    constraint merchant_payout_left_with_proof check (
        (state in ('left', 'returned')) = (sent_at is not null) and (sent_at is null) = (proof is null)
        and btrim(proof) <> ''
    ),
    constraint merchant_payout_ended_with_a_reason check (
        (state in ('returned', 'canceled')) = (ended_at is not null) and (ended_at is null) = (reason is null)
        and btrim(reason) <> ''
    )
);
-- A canceled payout has moved nothing, so another one may take its place.
create unique index merchant_is_paid_out_once_in_a_period
on surety.merchant_payouts (merchant_id, currency, schedule, period_begins) where state <> 'canceled';
create unique index proof_is_of_one_merchant_payout on surety.merchant_payouts (proof) where proof is not null;
create index merchant_payouts_of_a_merchant on surety.merchant_payouts (merchant_id, id);
create index merchant_payouts_to_send on surety.merchant_payouts (id) where state = 'asked';
comment on table surety.merchant_payouts is
'Payouts to merchants: what we owe them leaves as one instruction. asked: its amount is reserved; left: the transfer was
made, with its proof; returned: it came back; canceled: it never left. period_begins is the first day of the period of
its schedule, or its own day if it was made by hand.';

-- --------------------------------------------------------------------------------------------------------- outbox

create table outbox.restore_generations (
    generation integer not null,
    system_identifier bigint not null,
    timeline bigint not null,
    is_drill boolean not null default false,
    started_at timestamptz not null,
    reason text not null,
    constraint restore_generations_pkey primary key (generation)
);
comment on table outbox.restore_generations is
'Transaction ids are comparable only within one restore generation. `surety restored` opens a new one after a restore,
`surety drill` in a copy that can do no business (is_drill). The identifier of the cluster and its timeline at that time
show later that the database was restored again.';

create table outbox.business_servers (
    address text collate "C" not null,
    constraint business_servers_pkey primary key (address),
    constraint business_server_has_a_plain_address check (
        case when address <> 'local' then address = host(address::inet) else true end
    )
);
comment on table outbox.business_servers is
'The addresses of the servers that may do business in live mode. While none is listed, the timeline must be that of the
newest restore generation. `local` stands for a Unix socket.';

create table outbox.event_types (
    type text collate "C" not null,
    is_for_merchants boolean not null,
    meaning text not null,
    constraint event_types_pkey primary key (type)
);
comment on table outbox.event_types is
'The types of events, from db/sql/outbox/event_types.sql. outbox.emit_event refuses any other type. It gives an event a
merchant only if the type is for merchants; api.list_events shows those. There is no foreign key from outbox.events,
because every insert would lock its type''s row, the same few rows in all transactions. A test compares the types in
the SQL sources with these rows instead.';

create table outbox.events (
    id text collate "C" not null,
    aggregate_type text not null,
    aggregate_id text collate "C" not null,
    type text collate "C" not null,
    payload jsonb not null,
    merchant_id text collate "C",
    version integer,
    generation integer not null,
    xid xid8 not null default pg_current_xact_id(),
    at timestamptz not null,
    traceparent text collate "C",
    constraint events_pkey primary key (id),
    constraint event_traceparent_is_short check (length(traceparent) = 55)
) partition by range (id);
create index events_in_commit_order on outbox.events (generation, xid, id);
create index events_of_a_merchant on outbox.events (merchant_id, generation, xid, id) where merchant_id is not null;
comment on table outbox.events is
'The outbox, append-only. Columns as Debezium''s outbox router reads them, with the id of the writing transaction.';
comment on column outbox.events.traceparent is
'The trace context (W3C) of the request that caused the event, if it sent one.';

create table outbox.handlers (
    handler text collate "C" not null,
    meaning text not null,
    batch_size integer not null,
    batches_at_once integer not null,
    calls_provider boolean not null default false,
    lease interval not null default '60 seconds',
    retry_after interval[] not null default '{"5 seconds","60 seconds"}',
    generation integer not null,
    seen pg_snapshot not null,
    goal pg_snapshot,
    at_xid xid8 not null default '0',
    at_id text collate "C" not null default '',
    claims_again_at timestamptz,
    paused_at timestamptz,
    constraint handlers_pkey primary key (handler),
    constraint handler_batch_is_bounded check (batch_size between 1 and 10000 and batches_at_once between 1 and 16),
    constraint handler_gives_up_after_its_delays check (cardinality(retry_after) between 1 and 10)
);
comment on table outbox.handlers is
'Handlers, each with its cursor. All events visible in seen were claimed; events visible in goal are being claimed, up
to (at_xid, at_id). A failed event is retried after each delay of retry_after, then it is a dead letter. Until
claims_again_at no worker job is needed: a worker that drains the handler claims its new events then.';

create table outbox.handler_events (
    handler text collate "C" not null,
    event_type text collate "C" not null,
    constraint handler_events_pkey primary key (handler, event_type),
    constraint handler_event_is_of_a_handler foreign key (handler) references outbox.handlers (handler),
    constraint handler_event_is_an_event_type foreign key (event_type) references outbox.event_types (type)
);
comment on table outbox.handler_events is
'Which handlers process events of which type, from db/sql/outbox/handlers.sql.';

create sequence outbox.fences;

create table outbox.batches (
    id bigint not null default nextval('outbox.fences'),
    handler text collate "C" not null,
    event_ids text[] not null,
    first_id text collate "C" not null,
    last_id text collate "C" not null,
    is_retry boolean not null default false,
    is_suspect boolean not null default false,
    fence bigint not null,
    leased_by text not null,
    leased_until timestamptz not null,
    claimed_at timestamptz not null,
    constraint batches_pkey primary key (id),
    constraint batch_belongs_to_a_handler foreign key (handler) references outbox.handlers (handler),
    constraint batch_is_not_empty check (cardinality(event_ids) > 0),
    constraint suspects_run_alone check (not is_suspect or cardinality(event_ids) = 1)
);
create index batches_by_lease on outbox.batches (handler, leased_until);
comment on table outbox.batches is
'Events that are claimed and not completed, one row per claim. first_id and last_id bound event_ids, so that reading
them touches few partitions. Completion requires the current fence, a fencing token.';

create table outbox.release_causes (
    cause text collate "C" not null,
    finding text not null,
    first_delay interval not null,
    delay_max interval not null,
    meaning text not null,
    constraint release_causes_pkey primary key (cause),
    constraint release_delays_are_ordered check (first_delay <= delay_max)
);
comment on table outbox.release_causes is
'Why an event is given back without counting a failure. The delay doubles with each release of an event, from
first_delay to delay_max. finding is the finding of `surety status` that reports events that wait for long.';

insert into outbox.release_causes (cause, finding, first_delay, delay_max, meaning) values
('circuit_open', 'circuit-open', '0', '0', 'the circuit of its account is open'),
('outage', 'waiting-events', '0', '0', 'its call failed in an outage of the provider'),
('provider_busy', 'waiting-events', '1 second', '5 minutes', 'the provider asks for a later repetition'),
('access_refused', 'access-refused', '1 minute', '5 minutes', 'the provider refuses its call, but no other ones'),
('fetched_elsewhere', 'waiting-events', '1 second', '1 minute', 'another worker fetches the same dispute'),
('earlier_call', 'waiting-events', '1 second', '5 minutes', 'the outcome of an earlier call is unknown'),
('method_needed', 'waiting-events', '1 second', '5 minutes', 'a payment that was accepted needs the saved method'),
('worker_stopped', 'waiting-events', '0', '0', 'its worker was stopped'),
('database_failed', 'waiting-events', '1 second', '1 minute', 'the database failed while it was handled');

create table outbox.retries (
    handler text collate "C" not null,
    event_id text collate "C" not null,
    failures smallint not null default 0,
    worker_deaths smallint not null default 0,
    attempts jsonb not null default '[]',
    due_at timestamptz,
    blocked_by text,
    cause text collate "C",
    releases integer not null default 0,
    waiting_since timestamptz,
    constraint retries_pkey primary key (handler, event_id),
    constraint retry_belongs_to_a_handler foreign key (handler) references outbox.handlers (handler),
    constraint retry_release_has_a_known_cause foreign key (cause) references outbox.release_causes (cause),
    constraint released_retry_waits_since_a_time check ((cause is null) = (waiting_since is null))
);
create index retries_due on outbox.retries (handler, due_at) where due_at is not null;
create index retries_blocked on outbox.retries (blocked_by) where blocked_by is not null;
comment on table outbox.retries is
'Events that failed (failures) or whose worker died (worker_deaths). due_at is null during a retry. blocked_by is the
key of the circuit whose outage failed the event last or holds it. cause is why it was last given back uncounted,
releases how often in a row, waiting_since the time of the first.';

create table outbox.dead_letters (
    id text collate "C" not null,
    handler text collate "C" not null,
    event_id text collate "C" not null,
    type text collate "C" not null,
    payment_id text collate "C",
    payload jsonb not null,
    attempts jsonb not null,
    reason text not null,
    died_at timestamptz not null,
    closed_at timestamptz,
    closed_as text,
    closed_by text,
    closed_because text,
    constraint dead_letters_pkey primary key (id),
    constraint dead_letter_is_closed_with_a_reason check (
        (closed_at is null) = (closed_as is null) and (closed_at is null) = (closed_because is null)
        and btrim(closed_because) <> ''
    ),
    constraint dead_letter_ending_is_known check (closed_as in ('replayed', 'discarded', 'resolved'))
);
create unique index dead_letter_is_open_once on outbox.dead_letters (handler, event_id) where closed_at is null;
create index dead_letters_that_are_open on outbox.dead_letters (id) where closed_at is null;
create index dead_letters_of_a_payment on outbox.dead_letters (payment_id) where payment_id is not null;
comment on table outbox.dead_letters is
'Events without further retries, with their payload and all attempts, open until an operator closes them, or the end of
the payment or refund or of a dispute''s evidence.';

-- ------------------------------------------------------------------------------------------------ webhook endpoints

-- A place in a merchant's log, as a cursor holds it: all events visible in seen, and of those visible in goal those up
-- to (at_xid, at_id).
create type outbox.log_position as (
    generation integer,
    seen pg_snapshot,
    goal pg_snapshot,
    at_xid xid8,
    at_id text
);

create table outbox.sealing_keys (
    id text collate "C" not null,
    public_key bytea not null,
    published_at timestamptz not null,
    constraint sealing_keys_pkey primary key (id),
    constraint sealing_key_is_an_x25519_key check (length(public_key) = 32)
);
comment on table outbox.sealing_keys is
'Public keys of the workers'' SURETY_WEBHOOK_KEY. The API encrypts new signing secrets for the one that was published
last; only a process with the private key can open them.';

create table outbox.webhook_endpoints (
    id text collate "C" not null,
    merchant_id text collate "C" not null,
    url text not null,
    description text,
    event_types text[] not null,
    payload text not null,
    api_version text not null,
    concurrency smallint not null default 4,
    rate_max smallint,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    disabled_at timestamptz,
    disabled_because text,
    deleted_at timestamptz,
    generation integer not null,
    seen pg_snapshot not null,
    goal pg_snapshot,
    at_xid xid8 not null default '0',
    at_id text collate "C" not null default '',
    from_event_id text collate "C" not null default '',
    not_before timestamptz,
    failing_since timestamptz,
    failed_attempts integer not null default 0,
    noticed_percent smallint not null default 0,
    constraint webhook_endpoints_pkey primary key (id),
    constraint webhook_endpoint_id_is_an_endpoint_id check (id ~ '^we_[0-9a-f]{24}$'),
    constraint webhook_endpoint_belongs_to_a_merchant foreign key (merchant_id) references surety.merchants (id),
    constraint webhook_endpoint_has_an_http_address check (url ~ '^https?://[^\s/?#@]+([/?]\S*)?$'),
    constraint webhook_endpoint_wants_some_events check (cardinality(event_types) between 1 and 100),
    constraint webhook_payload_is_known check (payload in ('full', 'thin')),
    constraint webhook_endpoint_concurrency_is_bounded check (concurrency between 1 and 16),
    constraint webhook_endpoint_rate_is_positive check (rate_max > 0),
    constraint webhook_endpoint_is_disabled_for_a_known_reason check (
        (disabled_at is null) = (disabled_because is null)
        and disabled_because in ('merchant', 'operator', 'failures', 'gone', 'deleted')
    ),
    constraint deleted_webhook_endpoint_is_disabled check (deleted_at is null or disabled_at is not null)
) with (fillfactor = 70);
create index webhook_endpoints_of_a_merchant on outbox.webhook_endpoints (merchant_id, id) where deleted_at is null;
comment on table outbox.webhook_endpoints is
'Merchants'' webhook endpoints, each a cursor over the merchant''s events, as outbox.handlers has one. Events with an id
below from_event_id are skipped by choice. No delivery is begun before not_before. failing_since is the time of the
first failure after the last success, failed_attempts the number of completed attempts since.';

create table outbox.webhook_secrets (
    id text collate "C" not null,
    endpoint_id text collate "C" not null,
    scheme text not null,
    sealing_key text collate "C" not null,
    sealed bytea not null,
    public_key text,
    created_at timestamptz not null,
    expires_at timestamptz,
    constraint webhook_secrets_pkey primary key (id),
    constraint webhook_secret_belongs_to_an_endpoint foreign key (endpoint_id)
    references outbox.webhook_endpoints (id),
    constraint webhook_secret_is_sealed_for_a_key foreign key (sealing_key) references outbox.sealing_keys (id),
    constraint webhook_secret_scheme_is_known check (scheme in ('v1', 'v1a')),
    constraint webhook_secret_of_v1a_has_a_public_key check ((scheme = 'v1a') = (public_key is not null))
);
create index webhook_secrets_of_an_endpoint on outbox.webhook_secrets (endpoint_id);
comment on table outbox.webhook_secrets is
'Signing secrets, encrypted for a sealing key: of HMAC-SHA256 (v1) and of Ed25519 (v1a). After a rotation the old ones
are valid until expires_at.';

create table outbox.webhook_ranges (
    endpoint_id text collate "C" not null,
    number integer not null,
    is_skipped boolean not null,
    event_types text[] not null,
    from_event_id text collate "C" not null default '',
    starts outbox.log_position not null,
    ends outbox.log_position,
    chosen_at timestamptz not null,
    chosen_by text not null,
    skipped_from timestamptz,
    skipped_to timestamptz,
    skipped_count bigint,
    constraint webhook_ranges_pkey primary key (endpoint_id, number),
    constraint webhook_range_belongs_to_an_endpoint foreign key (endpoint_id)
    references outbox.webhook_endpoints (id),
    constraint skipped_webhook_range_is_counted check (is_skipped = (skipped_count is not null))
);
comment on table outbox.webhook_ranges is
'The log as each endpoint takes it: ranges that are sent, with the filter in force, and ranges that the merchant or an
operator chose to skip. The last range that is sent has no end. invariant.webhook_events_are_accounted_for reads the
ranges that are sent.';

create table outbox.delivery_batches (
    endpoint_id text collate "C" not null,
    fence bigint not null,
    event_ids text[] not null,
    leased_by text not null,
    leased_until timestamptz not null,
    constraint delivery_batches_pkey primary key (endpoint_id),
    constraint delivery_batch_belongs_to_an_endpoint foreign key (endpoint_id)
    references outbox.webhook_endpoints (id),
    constraint delivery_batch_is_not_empty check (cardinality(event_ids) > 0)
);
comment on table outbox.delivery_batches is
'Events that a worker is sending to an endpoint, at most one batch an endpoint. Results require the current fence.';

create table outbox.delivery_retries (
    endpoint_id text collate "C" not null,
    event_id text collate "C" not null,
    failures smallint not null default 0,
    due_at timestamptz,
    given_up_at timestamptz,
    constraint delivery_retries_pkey primary key (endpoint_id, event_id),
    constraint delivery_retry_belongs_to_an_endpoint foreign key (endpoint_id)
    references outbox.webhook_endpoints (id),
    constraint given_up_delivery_is_not_due check (given_up_at is null or due_at is null)
);
create index delivery_retries_due on outbox.delivery_retries (due_at, endpoint_id) where due_at is not null;
comment on table outbox.delivery_retries is
'Events that an endpoint has not taken yet: to be sent again at due_at, or given up after the last attempt, until they
are replayed. due_at is null while they are sent.';

create table outbox.delivery_attempts (
    id text collate "C" not null,
    endpoint_id text collate "C" not null,
    event_id text collate "C" not null,
    outcome text not null,
    attempt smallint not null,
    status smallint,
    error text,
    answer text,
    duration_ms integer,
    constraint delivery_attempts_pkey primary key (endpoint_id, id),
    constraint delivery_outcome_is_known check (outcome in ('delivered', 'failed', 'skipped', 'late')),
    constraint delivery_answer_is_short check (octet_length(answer) <= 1024)
) partition by range (id);
create index delivery_attempts_of_an_event on outbox.delivery_attempts (event_id);
comment on table outbox.delivery_attempts is
'The delivery log: each completed attempt, its time in its id, and each event that was skipped by choice after a
failure. late: a success that came after another worker had taken over. Only of a failure, up to 1 kB of the answer is
kept. Partitions are dropped after 90 days.';

create table outbox.delivery_hours (
    endpoint_id text collate "C" not null,
    hour timestamptz not null,
    delivered bigint not null default 0,
    failed bigint not null default 0,
    skipped bigint not null default 0,
    milliseconds bigint not null default 0,
    constraint delivery_hours_pkey primary key (endpoint_id, hour)
);
comment on table outbox.delivery_hours is
'Counts of deliveries by endpoint and hour, with the sum of the durations of completed attempts. Kept for two years.';

-- ---------------------------------------------------------------------------------------------------------- audit

create table audit.entries (
    id text collate "C" not null,
    at timestamptz not null,
    xid xid8 not null default pg_current_xact_id(),
    kind text not null,
    actor text not null,
    address text,
    request_id text collate "C",
    payment_id text collate "C",
    merchant_id text collate "C",
    version integer,
    from_state text,
    to_state text,
    outcome text not null,
    reason text,
    duration_ms numeric(12, 3),
    snapshot jsonb not null default '{}',
    constraint entry_kind_is_known check (
        kind in (
            'request', 'step', 'refund', 'dispute', 'call', 'answer', 'webhook', 'operator', 'denied', 'retry',
            'dead_letter', 'system'
        )
    ),
    constraint entry_of_a_step_names_the_step check ((kind = 'step') = (version is not null and to_state is not null))
) partition by range (id);
create index entries_of_a_payment on audit.entries (payment_id, id) where payment_id is not null;
-- Entries lie in the order of their ids, nearly. An exact index would be a tenth of a payment's index entries.
create index entries_by_id on audit.entries using brin (id) with (pages_per_range = 32, autosummarize = on);
comment on table audit.entries is
'The audit trail, append-only: requests, steps, provider calls (before and after), webhooks, operators'' actions,
denials.';

create table audit.refusals (
    hour timestamptz not null,
    kind text not null,
    reason text not null,
    actor text not null,
    count bigint not null,
    constraint refusals_pkey primary key (hour, kind, reason, actor),
    constraint refusal_reason_is_known check (
        (kind, reason) in (
            ('denied', 'unauthenticated'), ('denied', 'other-mode'), ('denied', 'forbidden'), ('denied', 'not-found'),
            ('denied', 'key-revoked'), ('denied', 'key-expired'), ('denied', 'network-not-allowed'),
            ('denied', 'scope-missing'), ('denied', 'merchant-suspended'),
            ('webhook', 'no-signature'), ('webhook', 'wrong-signature'), ('webhook', 'old-signature'),
            ('webhook', 'no-event'),
            ('limited', 'key'), ('limited', 'merchant'), ('limited', 'address')
        )
    )
);
comment on table audit.refusals is
'How many requests with a wrong API key, how many webhooks, and how many requests beyond a rate limit were refused in an
hour. actor is an existing key, merchant or operator, or empty, so that senders without a key can''t add rows. Rows are
deleted after 30 days.';

-- ------------------------------------------------------------------------------------------------- reconciliation

create table surety.expectations (
    payment_id text collate "C" not null,
    kind text not null,
    opened_at timestamptz not null,
    due_at timestamptz not null,
    met_at timestamptz,
    constraint expectations_pkey primary key (payment_id, kind),
    constraint expectation_kind_is_known check (kind in ('settlement'))
) partition by range (payment_id);
create index expectations_open on surety.expectations (due_at) where met_at is null;
comment on table surety.expectations is
'What should follow and by when. One that is not met in time opens a discrepancy.';

create table surety.discrepancies (
    id text collate "C" not null,
    kind text not null,
    subject text collate "C" not null,
    occurrence integer not null,
    severity text not null,
    payment_id text collate "C",
    merchant_id text collate "C",
    currency text,
    detail text not null,
    fields jsonb not null,
    source_here text,
    source_there text,
    data jsonb not null default '{}',
    first jsonb,
    opened_at timestamptz not null,
    seen_again integer not null default 0,
    seen_again_at timestamptz,
    assignee text,
    snoozed_until timestamptz,
    note text,
    closed_at timestamptz,
    closed_as text,
    closed_by text,
    closed_because text,
    constraint discrepancies_pkey primary key (id),
    constraint discrepancy_kind_is_known check (
        kind in (
            'missing_at_provider',
            'missing_here',
            'amount',
            'currency',
            'fee',
            'state',
            'duplicate',
            'overdue',
            'account',
            'livemode', 'foreign', 'unmatched_cash', 'exchange', 'return_without_entry', 'negative_balance', 'category',
            'unrecorded'
        )
    ),
    constraint discrepancy_severity_is_known check (severity in ('notice', 'warning', 'critical')),
    constraint discrepancy_names_fields check (jsonb_typeof(fields) = 'array' and fields <> '[]'),
    constraint discrepancy_is_closed_as_known check (
        closed_as in ('arrived_late', 'explained', 'corrected', 'written_off', 'forced')
    ),
    constraint discrepancy_is_closed_with_a_reason check (
        num_nonnulls(closed_at, closed_as, closed_by, closed_because) in (0, 4)
    ),
    constraint discrepancy_is_seen_again_at_a_time check ((seen_again = 0) = (seen_again_at is null)),
    constraint discrepancy_occurrences_are_numbered unique (kind, subject, occurrence)
);
create unique index discrepancy_is_open_once on surety.discrepancies (kind, subject) where closed_at is null;
create index discrepancies_of_a_payment on surety.discrepancies (payment_id) where payment_id is not null;
comment on table surety.discrepancies is
'Reconciliation breaks: where our records and the provider''s or the bank''s differ, until an operator or a later fact
closes them. fields: [{field, here, there, delta_minor}], the newest values; delta_minor is there less here, in minor
units of currency, null for a field that is no amount. source_here and source_there are the ids of the two records.
first keeps detail, fields and sources as they were at opened_at, once a repetition has changed them. A repetition of an
open discrepancy counts as seen again; after the closing it is the next occurrence.';

create table surety.poll_cursors (
    provider text not null,
    account text not null,
    list text not null,
    polled_to timestamptz,
    failures integer not null default 0,
    failing_since timestamptz,
    error text,
    is_refused boolean not null default false,
    constraint poll_cursors_pkey primary key (provider, account, list),
    constraint unreadable_list_has_an_error check (
        (failures = 0) = (failing_since is null) and (failures = 0) = (error is null)
    )
);
comment on table surety.poll_cursors is
'How far each list of a provider has been read, by the provider''s clock (null: never to its end). Every reading
overlaps the last. failures counts the readings since failing_since that did not reach the end; is_refused: the
provider refused the last one.';

create table surety.provider_keys (
    provider text not null,
    livemode boolean not null,
    is_restricted boolean not null,
    key_digest text,
    account_id text,
    other_account_id text,
    missing_permissions text[] not null default '{}',
    missing_since timestamptz,
    checked_at timestamptz,
    error text,
    constraint provider_keys_pkey primary key (provider),
    constraint own_account_is_an_account_id check (account_id ~ '^acct_[0-9A-Za-z_]{1,200}$'),
    constraint other_account_is_another check (other_account_id <> account_id),
    constraint missing_permissions_have_a_time check ((missing_permissions = '{}') = (missing_since is null))
);
comment on table surety.provider_keys is
'What the last check of each provider''s key found; the key itself is not stored. key_digest has the first eight digits
of its SHA-256, which show that the key is another one. account_id is the platform''s own
account, null if unknown; it stays once there is a merchant. other_account_id is that of the key, if it is another one.
checked_at is the end of the last finished check. error is that of a later, unfinished one.';

create table surety.periodic_jobs (
    job text collate "C" not null,
    every interval not null,
    first_run_at timestamptz not null,
    succeeded_at timestamptz,
    failures integer not null default 0,
    failing_since timestamptz,
    error text,
    constraint periodic_jobs_pkey primary key (job),
    constraint failing_job_has_an_error check (
        (failures = 0) = (failing_since is null) and (failures = 0) = (error is null)
    )
);
comment on table surety.periodic_jobs is
'The last results of the workers'' periodic jobs. failures counts the runs that failed since failing_since.';
